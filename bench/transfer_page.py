"""The section of docs/benchmarks.md on registries, from the figures of bench/transfer.py.

python bench/transfer_page.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sections as sections_of
from machine import ROOT
from tables import ranged, table

ABOUT = """\
One file of random bytes through docker-registry on loopback, Enginewright beside curl and oras-py in one run; the order
of the tools changes from round to round. Enginewright checks every byte against its digest while it sends and while it
receives, and its pull ends with the file on disk (fsync). oras-py hashes what it sends and nothing that it receives,
curl hashes nothing (the digest is given to it); neither waits for the disk. The start of Python is in the figures."""


def write(document: Mapping[str, Any], file: Path = sections_of.PAGE) -> None:
    """Replace the section in the page, or put it there."""
    sections_of.put("registries", sections(document), file)


def sections(document: Mapping[str, Any]) -> str:
    """A table for each size and direction."""
    told = document["machine"]
    machine = f"{told['processors']} processors, {told['memory_gb']} GB; other work ran on them at the same time."
    lines = ["## Registries", "", ABOUT, "", machine, ""]
    for name, size in document["sizes"].items():
        for verb in ("push", "pull"):
            rounds = next(iter(size["tools"].values()))[verb]["runs"]
            lines += [f"{verb.capitalize()} of {name}, median of {rounds} rounds (smallest-largest):", ""]
            rows = [row(tool, figures[verb], size["bytes"]) for tool, figures in size["tools"].items()]
            lines += [table(("tool", "MB/s", "CPU s", "peak MiB"), rows), ""]
        lines += [f"Measured on {size['date']}, load average {min(size['load'])} to {max(size['load'])}.", ""]
    return "\n".join(lines).rstrip()


def row(tool: str, cost: Mapping[str, Any], size_bytes: int) -> list[str]:
    """Speed, CPU time and memory of one tool."""
    slowest, fastest = sorted(size_bytes / 1e6 / seconds for seconds in cost["wall_s_range"])
    spread = "" if cost["runs"] == 1 else f" ({slowest:.0f}-{fastest:.0f})"
    speed = f"{size_bytes / 1e6 / cost['wall_s']:.0f}{spread}"
    return [tool, speed, ranged(cost, "cpu_s", 2), f"{cost['peak_bytes'] / 2**20:.0f}"]


if __name__ == "__main__":
    write(json.loads((ROOT / ".bench" / "transfer.json").read_text("utf-8")))
