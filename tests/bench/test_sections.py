"""A section of the page of benchmarks is replaced, and what others wrote is left alone."""

from __future__ import annotations

from pathlib import Path

import sections


def test_a_section_is_put_and_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n## Versions\n\nnone\n")
    sections.put("one", "## One\n\n1\n", page)
    sections.put("two-b", "## Two", page)
    sections.put("one", "## One\n\n2", page)
    assert sections.kept(page.read_text()) == {"one": "## One\n\n2\n", "two-b": "## Two\n"}
    assert page.read_text().startswith("# Page\n\n<!-- one: begin -->\n## One\n")
    assert page.read_text().endswith("<!-- two-b: end -->\n\n## Versions\n\nnone\n")
