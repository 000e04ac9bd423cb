"""Pictures of parity reports: the distribution of the divergence by target, and bars of any metrics.

Needs matplotlib (extra `report`). The same numbers give the same SVG.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import RecipeError, UnavailableError
from pipeline.parity import gates

_FLOOR = 1e-16  # nats; below it a divergence is rounding, and a logarithmic axis has no zero


def plot_divergence(kld: Mapping[str, npt.NDArray[Any]], out: Path) -> None:
    """Write the share of positions (vertical) above each KL divergence in nats (horizontal), a line a target.

    `kld`: target -> the array of its `kld.npy`. `out`: a file ending in .svg or .png.
    """
    if not any(len(values) for values in kld.values()):
        raise RecipeError("no divergences to plot", hint="only language models have a kld.npy")
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    for target, values in kld.items():
        finite = np.sort(np.maximum(values[np.isfinite(values)].astype(np.float64), _FLOOR))
        if len(finite):
            # What is not finite counts as larger than every number.
            axes.step(finite, 1 - np.arange(1, len(finite) + 1) / len(values), where="post", label=target)
    axes.set(xscale="log", xlabel="KL divergence of a position, nats", ylabel="share of positions above", ylim=(0, 1))
    axes.grid(True, alpha=0.3)
    axes.legend()
    _save(pyplot, figure, out)


def plot_metrics(reports: Mapping[str, Mapping[str, float | None]], names: Sequence[str], out: Path) -> None:
    """Write one panel of bars for each metric of `names`, a bar a target. A metric that a target lacks has no bar.

    `reports`: target -> the `metrics` of its report. Raises RecipeError for a name that is no metric.
    """
    unknown = [name for name in names if name not in gates.metrics()]
    if unknown or not names:
        known = f"metrics: {', '.join(gates.metrics())}"
        raise RecipeError(f"no metric is called {unknown[0]!r}" if unknown else "no metrics to plot", hint=known)
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, len(names), figsize=(2.6 * len(names) + 1, 3.6), squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        values = {target: report.get(name) for target, report in reports.items()}
        shown = {target: value for target, value in values.items() if value is not None and math.isfinite(value)}
        bars = axes.bar(list(shown), list(shown.values()))
        axes.bar_label(bars, fmt="%.3g", fontsize=8)
        unit = gates.metrics()[name].unit
        axes.set_title(f"{name}, {unit}" if unit else name, fontsize=10)
        axes.tick_params(axis="x", rotation=30)
    figure.tight_layout()
    _save(pyplot, figure, out)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UnavailableError(
            "matplotlib is not installed, which plots need", hint="pip install 'enginewright[report]'"
        ) from error
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "enginewright"  # else the ids in the SVG are random
    import matplotlib.pyplot

    return matplotlib.pyplot


def _save(pyplot: Any, figure: Any, out: Path) -> None:
    metadata = {"Date": None} if out.suffix == ".svg" else {}
    figure.savefig(out, metadata=metadata, bbox_inches="tight")
    pyplot.close(figure)
