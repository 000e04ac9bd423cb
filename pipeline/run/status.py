"""Hit or miss for every step of a plan, and the reason for a miss: a diff of two small files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.frozen import frozen
from pipeline.plan import Plan, PlannedStep
from pipeline.store import Store


@frozen
class Status:
    """Whether a step's result is there, and if not, why not."""

    step: PlannedStep
    hit: bool
    reason: str
    size_bytes: int


def status(plan: Plan, store: Store, last: Mapping[str, str]) -> Iterator[Status]:
    """Hit or miss for every step, with the reason for a miss; `last` is `Store.last` of this recipe."""
    for step in plan.steps:
        entry = store.get(step.key)
        if entry:
            yield Status(step, True, "", entry.size_bytes)
        else:
            yield Status(step, False, store.corrupt.get(step.key) or _reason(step, store, last), 0)


def _reason(step: PlannedStep, store: Store, last: Mapping[str, str]) -> str:
    key = last.get(f"{step.targets[0]}/{step.name}", "")
    if key == step.key:
        return "its result was removed"
    before = store.key_text(key)
    if before is None:
        return "not built yet"
    old, new = dict(_flat(before)), dict(_flat(step.key_text))
    changes = [
        f"{path} {old.get(path, '(none)')} -> {new.get(path, '(none)')}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path) and not path.startswith("needs.")
    ]
    changes += [f"{role} changed" for role in step.needs if old.get(f"needs.{role}") != new.get(f"needs.{role}")]
    return "; ".join(changes)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{prefix}.{index}")
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value
