"""Sections of docs/benchmarks.md that one script each writes: between two comments, so that others leave them alone."""

from __future__ import annotations

import re
from pathlib import Path

from machine import ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
_ANY = re.compile(r"<!-- ([\w-]+): begin -->\n.*?<!-- \1: end -->\n", re.DOTALL)


def put(name: str, content: str, file: Path = PAGE) -> None:
    """Replace the section of a name in the page, or put it before the page's list of versions."""
    text = file.read_text("utf-8")
    section = marked(name, content)
    for found in _ANY.finditer(text):
        if found[1] == name:
            text = text[: found.start()] + section + text[found.end() :]
            break
    else:
        place = text.index("## Versions")
        text = f"{text[:place]}{section}\n{text[place:]}"
    file.write_text(text, "utf-8")


def marked(name: str, content: str) -> str:
    """A section between its comments."""
    return f"<!-- {name}: begin -->\n{content.rstrip()}\n<!-- {name}: end -->\n"


def kept(text: str) -> dict[str, str]:
    """Name -> content of every section of a page."""
    return {
        found[1]: found[0].partition("\n")[2].rpartition(f"<!-- {found[1]}: end -->")[0]
        for found in _ANY.finditer(text)
    }
