"""Gates: which values of the parity metrics are good enough, as data, and the verdict on a report.

The thresholds and the metrics' directions are in `pipeline/data/gates.toml`. This module imports nothing heavy: the
command line judges a cached report with it in a process that starts in 0.3 s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from typing import Any, Literal

from pipeline.errors import RecipeError
from pipeline.frozen import frozen
from pipeline.tables import table

Direction = Literal["max", "min"]
"""`max`: the threshold is the largest value that passes; `min`: the smallest."""


class Outcome(StrEnum):
    """What became of a gate. `deferred` is not a kind of `passed`: nothing was measured yet."""

    PASSED = "passed"
    FAILED = "failed"
    DEFERRED = "deferred"
    OFF = "off"


@frozen
class Metric:
    """What a number of the report means."""

    name: str
    description: str
    unit: str
    direction: Direction | None
    """None: reported for the reader, never judged."""
    kinds: tuple[str, ...]
    """decoder, seq2seq, encoder."""
    source: str
    """How it is computed, or after whom it is named."""


@frozen
class Verdict:
    """One gate's outcome."""

    metric: str
    value: float | None
    """None: the report does not have it, or it was not a finite number."""
    threshold: float | None
    """None: switched off."""
    direction: Direction
    outcome: Outcome

    @property
    def passed(self) -> bool:
        """Whether it was measured and is good enough: neither deferred nor off."""
        return self.outcome is Outcome.PASSED


@cache
def metrics() -> dict[str, Metric]:
    """Every metric of every report by name, in the order in which a table shows them."""
    return {
        name: Metric(
            name=name,
            description=entry["description"],
            unit=entry["unit"],
            direction=entry.get("direction"),
            kinds=tuple(entry["kinds"]),
            source=entry["source"],
        )
        for name, entry in table("gates")["metrics"].items()
    }


def defaults(kind: str, precision: str, task: str | None = None) -> dict[str, float]:
    """The thresholds that hold where a recipe says nothing: those of the kind, then those of the task.

    Raises RecipeError for a kind or a precision that the table does not have.
    """
    by_precision = _lookup(table("gates")["gates"], kind, "kind of model")
    chosen: dict[str, float] = dict(_lookup(by_precision, precision, "precision"))
    chosen.update(table("gates")["tasks"].get(task or "", {}).get(precision, {}))
    return chosen


def check(overrides: Mapping[str, float | None], kind: str | None = None) -> None:
    """Refuse overrides that no report could answer: an unknown metric, one of another kind, a threshold of NaN.

    Without `kind` (a recipe whose task is not known yet) only the names and the numbers are checked.
    """
    for name, threshold in overrides.items():
        metric = metrics().get(name)
        if metric is None:
            near = get_close_matches(name, metrics(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"metrics: {', '.join(metrics())}"
            raise RecipeError(f"gates: unknown metric {name!r}", hint=hint)
        if metric.direction is None:
            raise RecipeError(
                f"gates: {name} is reported but cannot be a gate",
                hint="it describes the reference or an error bar; gate the value that it belongs to",
            )
        if kind is not None and kind not in metric.kinds:
            own = ", ".join(m.name for m in metrics().values() if kind in m.kinds and m.direction)
            raise RecipeError(f"gates: {name} is not measured for a model of kind {kind}", hint=f"use one of: {own}")
        if threshold is not None and (isinstance(threshold, bool) or not math.isfinite(threshold)):
            raise RecipeError(f"gates: {name}: {threshold!r} is not a number", hint="null switches a gate off")


def evaluate(
    report: Mapping[str, float | None] | None,
    kind: str,
    precision: str,
    overrides: Mapping[str, float | None] | None = None,
    task: str | None = None,
) -> tuple[Verdict, ...]:
    """Judge a report's `metrics` by the defaults of `kind` x `precision` (and `task`) with a recipe's overrides.

    `report` of None means that nothing ran here: every gate is deferred. A gate whose metric is missing from the
    report, or is not a finite number, fails. The verdicts come in the order of `metrics()`.
    """
    overrides = overrides or {}
    check(overrides, kind)
    thresholds: dict[str, float | None] = {**defaults(kind, precision, task), **overrides}
    return tuple(_judge(metrics()[name], thresholds[name], report) for name in metrics() if name in thresholds)


def overall(verdicts: Sequence[Verdict]) -> Outcome:
    """One outcome for all: failed if any failed, else deferred if any is, else passed, or off when none is on."""
    outcomes = {verdict.outcome for verdict in verdicts}
    for outcome in (Outcome.FAILED, Outcome.DEFERRED, Outcome.PASSED):
        if outcome in outcomes:
            return outcome
    return Outcome.OFF


def explain(verdict: Verdict) -> str:
    """One line for a reader: `kld_mean 0.0031 nats (at most 0.002): failed`."""
    metric = metrics()[verdict.metric]
    unit = f" {metric.unit}" if metric.unit else ""
    if verdict.threshold is None:
        bound = "no threshold"
    else:
        bound = f"{'at most' if verdict.direction == 'max' else 'at least'} {verdict.threshold:.6g}"
    if verdict.value is not None:
        value = f"{verdict.value:.6g}{unit}"
    else:
        value = "not measured yet" if verdict.outcome is Outcome.DEFERRED else "missing or not a number"
    return f"{verdict.metric} {value} ({bound}): {verdict.outcome}"


def _judge(metric: Metric, threshold: float | None, report: Mapping[str, float | None] | None) -> Verdict:
    value = None if report is None else report.get(metric.name)
    if value is not None and not math.isfinite(value):
        value = None
    direction = metric.direction
    assert direction is not None, f"{metric.name} has a default threshold but no direction"
    if threshold is None:
        outcome = Outcome.OFF
    elif report is None:
        outcome = Outcome.DEFERRED
    elif value is None:
        outcome = Outcome.FAILED
    else:
        good = value <= threshold if direction == "max" else value >= threshold
        outcome = Outcome.PASSED if good else Outcome.FAILED
    return Verdict(metric.name, value, threshold, direction, outcome)


def _lookup(table: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in table:
        near = get_close_matches(name, table, n=1)
        known = f"known: {', '.join(table)}"
        raise RecipeError(f"no gates for the {what} {name!r}", hint=f"did you mean {near[0]!r}?" if near else known)
    return table[name]
