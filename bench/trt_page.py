"""The section of docs/benchmarks.md on TensorRT-RTX, from the figures of bench/trt.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sections as sections_of
from tables import megabytes, ranged, table


def write(document: Mapping[str, Any], file: Path = sections_of.PAGE) -> None:
    """Replace the section in the page, or put it there."""
    sections_of.put("tensorrt", sections(document), file)


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
