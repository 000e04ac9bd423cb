"""The section on registries: written once, replaced afterwards, and nothing else of the page is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transfer_page


def cost(wall_s: float, peak_bytes: int) -> dict[str, Any]:
    return {
        "runs": 3,
        "exit_codes": [0],
        "cpu_s": 1.0,
        "cpu_s_range": [0.9, 1.1],
        "wall_s": wall_s,
        "wall_s_range": [wall_s / 2, wall_s * 2],
        "peak_bytes": peak_bytes,
        "peak_bytes_range": [0, peak_bytes],
    }


def document(wall_s: float) -> dict[str, Any]:
    tools = {name: {verb: cost(wall_s, 33 << 20) for verb in ("push", "pull")} for name in ("enginewright", "curl")}
    return {
        "machine": {"processors": 2, "memory_gb": 24},
        "sizes": {"300 MB": {"bytes": 300_000_000, "date": "2026-11-25", "load": [1.0, 4.0], "tools": tools}},
    }


def test_the_section_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text("# Benchmarks\n\ntext\n\n## Versions\n\nrest\n")
    transfer_page.write(document(3.0), page)
    first = page.read_text()
    assert "| enginewright | 100 (50-200) | 1.00 (0.90-1.10) | 33 |" in first
    assert first.index("text") < first.index("## Registries") < first.index("## Versions")
    transfer_page.write(document(2.0), page)
    assert page.read_text() == first.replace("100 (50-200)", "150 (75-300)")
