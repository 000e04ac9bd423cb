"""A scatter plot as SVG, coloured by the page's own style."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from pipeline.frozen import frozen

_WIDTH, _HEIGHT = 480, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 24, 16, 48


@frozen
class Axis:
    """What is drawn along an axis."""

    title: str
    log: bool = False


Point = tuple[str, float, float, bool]
"""(label, x, y, whether it is on the front)"""


def scatter(points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> str:
    """Labelled points with a line through those on the front, in the order of x."""
    x = _Scale([p[1] for p in points], x_axis.log, _LEFT, _WIDTH - _RIGHT)
    y = _Scale([p[2] for p in points], y_axis.log, _HEIGHT - _BOTTOM, _TOP)
    parts = [f'<line x1="{_LEFT}" y1="{_HEIGHT - _BOTTOM}" x2="{_WIDTH - _RIGHT}" y2="{_HEIGHT - _BOTTOM}"/>']
    parts.append(f'<line x1="{_LEFT}" y1="{_TOP}" x2="{_LEFT}" y2="{_HEIGHT - _BOTTOM}"/>')
    parts += [_text(x(value), _HEIGHT - _BOTTOM + 18, _short(value), "middle", "soft") for value in x.ticks()]
    for value in y.ticks():
        parts.append(_text(_LEFT - 8, y(value) + 4, _short(value), "end", "soft"))
        parts.append(f'<line x1="{_LEFT}" y1="{y(value):.1f}" x2="{_WIDTH - _RIGHT}" y2="{y(value):.1f}"/>')
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_axis.title, "middle"))
    parts.append(_text(_LEFT, _TOP - 4, y_axis.title, "start"))
    line = " ".join(f"{x(p[1]):.1f},{y(p[2]):.1f}" for p in sorted(points, key=lambda p: p[1]) if p[3])
    parts.append(f'<polyline points="{line}"/>')
    taken: list[tuple[float, float]] = []
    for label, a, b, ahead in points:
        px, py = x(a), y(b)
        kind = "" if ahead else ' class="behind"'
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5"{kind}><title>{html.escape(label)}</title></circle>')
        ty = py - 9
        while any(abs(ty - other_y) < 13 and abs(px - other_x) < 110 for other_x, other_y in taken):
            ty += 14
        taken.append((px, ty))
        near_edge = px > _WIDTH - 120
        parts.append(_text(px - 8 if near_edge else px + 8, ty, label, "end" if near_edge else "start"))
    name = html.escape(f"{y_axis.title} against {x_axis.title}", quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


class _Scale:
    def __init__(self, values: Sequence[float], log: bool, start: float, end: float) -> None:
        self._log = log and min(values) > 0
        low, high = (f(map(self._of, values)) for f in (min, max))
        room = 0.08 * (high - low) or 0.5 * (abs(low) or 1.0)
        self._low, self._high, self._start, self._end = low - room, high + room, start, end

    def _of(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def __call__(self, value: float) -> float:
        share = (self._of(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Four places that read well enough."""
        places = [self._low + (self._high - self._low) * (0.1 + 0.8 * step / 3) for step in range(4)]
        return [float(f"{10**each if self._log else each:.2g}") for each in places]


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    of_kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{of_kind}>{html.escape(text)}</text>'


def _short(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 0.01 or abs(value) >= 1e5 else f"{value:g}"
