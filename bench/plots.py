"""The plots of docs/benchmarks.md, as small SVG files whose bytes depend on the figures alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import OURS, TOOLS

COLOURS = {OURS: "#0b6e4f", "Olive": "#c8553d", "Optimum": "#e9b44c", "GenAI builder": "#3d5a80"}
PROOF = "#9fd3c0"


def _figure(width: float, height: float, columns: int = 1) -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def builds(jobs: Mapping[str, Any], path: Path) -> None:
    """CPU seconds of cold builds; ours in two parts, the draft and what the whole build takes beyond it."""
    chosen = {name: job for name, job in jobs.items() if "cold" in job["tools"].get(OURS, {})}
    figure, axes = _figure(8, 1 + 0.75 * len(chosen))
    axis, place, ticks = axes[0][0], 0.0, []
    for name, job in chosen.items():
        start = place
        for tool in TOOLS:
            phases = job["tools"].get(tool, {})
            cost = phases.get("cold")
            if not cost or cost["exit_codes"] != [0]:
                continue
            built = phases.get("draft", cost)["cpu_s"]
            axis.barh(place, built, color=COLOURS[tool])
            if tool == OURS:
                axis.barh(place, cost["cpu_s"] - built, left=built, color=PROOF)
            place += 1
        ticks.append((name, (start + place - 1) / 2))
        place += 0.8
    axis.set_yticks([at for _, at in ticks], [name for name, _ in ticks])
    axis.invert_yaxis()
    axis.set_xlabel("CPU seconds of a cold build")
    handles = [axis.barh(0, 0, color=colour) for colour in (*COLOURS.values(), PROOF)]
    names = [f"{OURS}: draft", *list(COLOURS)[1:], f"{OURS}: what its build takes beyond"]
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def decode(models: Mapping[str, Any], path: Path) -> None:
    """Tokens/s of every engine, a panel a model, with the range of the rounds."""
    rows = max(len(model["rows"]) for model in models.values())
    figure, axes = _figure(5 * len(models), 1 + 0.35 * rows, len(models))
    for axis, (name, model) in zip(axes[0], models.items(), strict=True):
        for place, row in enumerate(model["rows"]):
            tool = next((tool for tool in COLOURS if row["name"].startswith(tool)), "")
            low, high = row["tokens_per_s_range"]
            value = row["tokens_per_s"]
            error = [[value - low], [high - value]]
            axis.barh(place, value, color=COLOURS.get(tool, "#888888"), xerr=error, ecolor="#333333")
        axis.set_yticks(range(len(model["rows"])), [row["name"] for row in model["rows"]])
        axis.invert_yaxis()
        axis.set_xlabel("tokens/s")
        axis.set_title(name)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
