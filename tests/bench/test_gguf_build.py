"""The section on GGUF: what was measured is shown, and a new run takes the place of the old one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_build


def result(cpu_s: float) -> dict[str, Any]:
    row = {"cpu_s": cpu_s, "wall_s": 9.0, "peak_bytes": 210_000_000}
    return {
        "label": "Q4_K_M",
        "title": "A checkpoint",
        "date": "2026-11-25",
        "rows": {"llama.cpp, quantize": {**row, "cpu_s": 77.7}, "enginewright, both in one pass": row},
        "equal": 38,
        "tensors": 39,
        "input_bytes": 13_500_000_000,
        "output_bytes": 4_080_000_000,
        "between_bytes": 13_480_000_000,
        "machine": {"processors": 2, "arch": "x86_64"},
    }


def test_a_run_replaces_its_own_section_alone(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text("# Benchmarks\n\nBefore.\n\n## Versions\n\nAfter.\n", "utf-8")
    gguf_build.write(result(55.5), page)
    first = page.read_text("utf-8")
    assert first.index("Before.") < first.index("55.5") < first.index("## Versions")
    assert "38 of 39 tensors" in first
    gguf_build.write(result(44.4), page)
    second = page.read_text("utf-8")
    assert "55.5" not in second
    assert second == first.replace("55.5", "44.4")
