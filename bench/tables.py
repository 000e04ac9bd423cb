"""Figures as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Figures = Mapping[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: int = 1) -> str:
    """A Markdown table; columns from `right` on are aligned to the right."""
    rule = ["---"] * right + ["---:"] * (len(head) - right)
    lines = [head, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ranged(figures: Figures, name: str, digits: int = 1, scale: float = 1) -> str:
    """`5.3 (5.1-5.6)`; the range only where there is one."""
    low, high = (f"{value * scale:.{digits}f}" for value in figures[f"{name}_range"])
    middle = f"{figures[name] * scale:.{digits}f}"
    return middle if figures.get("runs", figures.get("rounds", 1)) == 1 or low == high else f"{middle} ({low}-{high})"


def megabytes(size: float) -> str:
    """Decimal megabytes, three figures."""
    value = size / 1e6
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
