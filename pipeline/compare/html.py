"""The report as one HTML file that needs nothing else: no network, no script; light and dark, wide and narrow."""

from __future__ import annotations

import html
from collections.abc import Sequence

from pipeline.compare.plot import Axis, scatter
from pipeline.compare.rows import Column, Row, front

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--soft:#5b6670;--paper:#fdfdfc;--line:#d8dde1;--mark:#0b6bcb;--good:#e6f2e8}
@media(prefers-color-scheme:dark){
:root{--ink:#e6e9eb;--soft:#9aa5ae;--paper:#15181b;--line:#343b41;--mark:#6cb4ff;--good:#1d3324}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper)}
body{margin:0 auto;max-width:80rem;padding:1.5rem 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}p,figcaption{color:var(--soft);margin:.3rem 0}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.5rem}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .7rem;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
td.long{white-space:normal;min-width:9rem}
tr:last-child td{border-bottom:0}th{color:var(--soft);font-weight:600}
td.number{text-align:right}td.best{background:var(--good)}
th:first-child,td:first-child{position:sticky;left:0;background:var(--paper);font-weight:600}
.cited{font-style:italic}.deferred,.none{color:var(--soft)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(22rem,100%),1fr));gap:1rem}
figure{margin:0;border:1px solid var(--line);border-radius:.5rem;padding:.8rem}svg{width:100%;height:auto;display:block}
svg text{fill:var(--ink);font:12px system-ui,sans-serif}svg .soft{fill:var(--soft)}svg line{stroke:var(--line)}
svg polyline{fill:none;stroke:var(--mark);stroke-width:2}svg circle{fill:var(--mark)}svg circle.behind{fill:var(--soft)}
code{font-size:.85em;overflow-wrap:anywhere}
"""


def page(title: str, machine: str, rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """The whole report."""
    best = {column.name: _best(rows, column) for column in columns if column.best}
    identity = [column for column in columns if not column.best][:4]
    numbers = [column for column in columns if column.best]
    abilities = [column for column in columns if not column.best][4:]
    named = [identity[0]]
    parts = [
        f"<h1>{html.escape(title)}</h1><p>{html.escape(machine)}</p>",
        "<p>A cell's title says where it comes from. <em>Italic</em>: from a cited source. Shaded: the best of those "
        "that ran here. An asterisk: of the weights that an engine was made from; it has not run here itself.</p>",
        "<h2>Measured</h2>",
        _table(rows, [*identity, *numbers], best),
        "<h2>Quality against speed and size</h2>",
        f'<div class="plots">{"".join(_plots(rows, columns))}</div>',
        "<h2>What each can do</h2>",
        _table(rows, [*named, identity[1], *abilities], {}),
        "<h2>Artifacts</h2>",
        "".join(f"<p>{html.escape(row.target)}: <code>{row.artifact_id}</code>, {row.verdict}</p>" for row in rows),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _best(rows: Sequence[Row], column: Column) -> float | None:
    values = [row.cells[column.name].value for row in rows if row.cells[column.name].origin in ("measured", "manifest")]
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    found: float = min(known) if column.best == "low" else max(known)
    return found


def _table(rows: Sequence[Row], columns: Sequence[Column], best: dict[str, float | None]) -> str:
    head = "".join(f"<th>{html.escape(column.title)}</th>" for column in columns)
    body = []
    for row in rows:
        cells = []
        for column in columns:
            cell = row.cells[column.name]
            marks = [cell.origin, "number" if column.best else "", "long" if len(cell.text) > 24 else ""]
            if (
                column.name in best
                and cell.value is not None
                and cell.value == best[column.name]
                and "*" not in cell.text
            ):
                marks.append("best")
            title = html.escape(f"{cell.origin}: {cell.where}" if cell.where else cell.origin, quote=True)
            cells.append(f'<td class="{" ".join(filter(None, marks))}" title="{title}">{html.escape(cell.text)}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _plots(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    names = {column.name: column for column in columns}
    quality = names["kld_mean"] if "kld_mean" in names else names["cosine_mean"]
    speed = names["decode_tokens_per_s"] if "decode_tokens_per_s" in names else names["texts_per_s"]
    found = []
    for cost in (speed, names["size_bytes"]):
        ran = [row for row in rows if None not in (row.cells[cost.name].value, row.cells[quality.name].value)]
        if len(ran) < 2:
            continue
        ahead = front(ran, cost.name, quality.name, low_cost=cost.best == "low", low_gain=quality.best == "low")
        scale = 1e-6 if cost.name == "size_bytes" else 1.0
        points = [(r.target, scale * r.cells[cost.name].value, r.cells[quality.name].value, r in ahead) for r in ran]
        drawing = scatter(points, Axis(cost.title, log=True), Axis(quality.title, log=quality.name == "kld_mean"))
        caption = (
            f"{quality.title} ({quality.best} is good) against {cost.title} ({cost.best} is good); line: Pareto front"
        )
        found.append(f"<figure>{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return found
