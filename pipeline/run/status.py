"""Hit or miss for every step of a plan, and the reason for a miss: a diff of two small files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.frozen import frozen
from pipeline.plan import Plan, PlannedStep
from pipeline.run.lean import read_at_the_end
from pipeline.store import Store


@frozen
class Status:
    """Whether a step's result is there, and if not, why not."""

    step: PlannedStep
    hit: bool
    reason: str
    size_bytes: int
    thin: bool = False
    """A hit whose large files were dropped: no step that has to run reads them."""


def status(plan: Plan, store: Store, last: Mapping[str, str]) -> Iterator[Status]:
    """Hit or miss for every step, with the reason for a miss; `last` is `Store.last` of this recipe."""
    entries = {step.key: store.get(step.key, thin=True) for step in plan.steps}
    read = read_at_the_end(plan)
    for step in reversed(plan.steps):
        entry = entries[step.key]
        if entry is None or (not entry.whole and step.key in read):
            read.update(step.needs.values())
    for step in plan.steps:
        entry = entries[step.key]
        if entry and (entry.whole or step.key not in read):
            yield Status(step, True, "", entry.size_bytes, thin=not entry.whole)
        elif entry:
            yield Status(step, False, "a step that runs reads what `build --lean` dropped of its result", 0)
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
