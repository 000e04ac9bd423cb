"""The section of docs/benchmarks.md on TensorRT-RTX, from the figures of bench/trt.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from machine import ROOT
from tables import megabytes, ranged, table

BEGIN, END = "<!-- tensorrt: begin -->", "<!-- tensorrt: end -->"


def write(document: Mapping[str, Any], file: Path = ROOT / "docs" / "benchmarks.md") -> None:
    """Replace the section in the page, or put it before its list of versions."""
    text = file.read_text("utf-8")
    section = f"{BEGIN}\n{sections(document)}\n{END}\n"
    if BEGIN in text:
        text = text[: text.index(BEGIN)] + section.rstrip() + text[text.index(END) + len(END) :]
    else:
        place = text.index("## Versions")
        text = f"{text[:place]}{section}\n{text[place:]}"
    file.write_text(text, "utf-8")


def sections(document: Mapping[str, Any]) -> str:
    """A table for each model."""
    machines = ", ".join(document["capabilities"])
    lines = [
        "## TensorRT-RTX, built without a GPU",
        "",
        f"Measured by `bench/trt.py` on {document['date']}: TensorRT-RTX {document['version']}, one engine for compute "
        f"capabilities {machines}, random weights, batch up to 32, length up to 512. Each row is the process of one "
        "step; the median, with smallest and largest. An engine is compiled on one core. No peer builds these engines "
        "without a GPU.",
        "",
    ]
    for found in document["models"].values():
        rows = [
            [name, ranged(cost, "cpu_s"), ranged(cost, "peak_bytes", 0, 1e-6), megabytes(cost["output_bytes"])]
            for name, cost in found["steps"].items()
        ]
        lines += [f"### {found['title']}", "", table(["step", "CPU s", "peak MB", "written MB"], rows), ""]
    return "\n".join(lines).rstrip()
