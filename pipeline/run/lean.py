"""`build --lean`: at the end of a build, drop what no artifact holds and no later run of the same build reads.

A result whose large files were dropped keeps its record and its small files. It is a hit as long as no step that has to
run reads it; where one does, it is made again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.plan import Plan
from pipeline.store import Store

SMALL = 64 << 10
"""Bytes up to which a file is kept: what a result says of itself, not what it is."""
PACKAGED = ("engine", "golden")
"""The steps whose files an artifact holds."""


def read_at_the_end(plan: Plan) -> set[str]:
    """Keys of the results whose files the end of a build reads: what is packaged, and the reports of parity."""
    return {
        key
        for keys in plan.targets.values()
        for name, key in keys.items()
        if name in PACKAGED or name.startswith("parity")
    }


def drop(plan: Plan, store: Store) -> int:
    """Drop the large files of every other result; the bytes."""
    kept = read_at_the_end(plan)
    return sum(thin(store, step.key) for step in plan.steps if step.key not in kept)


def thin(store: Store, key: str) -> int:
    """Drop the large files of one result; the bytes: none where a build uses it."""
    with store.unused(key) as free:
        entry = store.get(key, thin=True) if free else None
        large = [file for file in entry.files if _large(file)] if entry else []
        if entry is None or not large:
            return 0
        for file in large:
            file["dropped"] = True
        # First the record: who is killed here leaves files that nobody asks for, never a record of missing ones.
        store.note(entry)
        for file in large:
            (entry.out / file["path"]).unlink(missing_ok=True)
        return sum(int(file["size"]) for file in large)


def _large(file: dict[str, Any]) -> bool:
    licence = Path(file["path"]).name.lower().startswith("licen")  # artifacts hold it
    return file["size"] > SMALL and not licence and not file.get("dropped")
