"""What `build --plan` prints: every step, whether its result is there, and why it would run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from pipeline.cli.console import megabytes, table
from pipeline.cli.prepare import Prepared
from pipeline.run.status import Status
from pipeline.store import Store

if TYPE_CHECKING:
    from pipeline.shared import Record


def show(
    prepared: Prepared, states: Sequence[Status], there: Mapping[str, Record], store: Store, most: int, form: str
) -> None:
    """Print it. `there` is what a shared store has, `most` the memory of this machine in bytes, 0 where unknown."""
    sizes = [there[s.step.key].size_bytes if s.step.key in there else s.size_bytes for s in states]
    rows = [
        {
            "step": state.step.label,
            "stage": state.step.stage.name,
            "key": state.step.key,
            "targets": list(state.step.targets),
            "state": "hit" if state.hit else "shared" if state.step.key in there else "miss",
            "reason": "" if state.step.key in there else state.reason,
            "size_bytes": size_bytes,
            "memory_need_bytes": state.step.memory_bytes,
            "toolchain": state.step.stage.toolchain,
            "scope": state.step.stage.scope,
        }
        for state, size_bytes in zip(states, sizes, strict=True)
    ]
    if form == "json":
        document = {"recipe": prepared.recipe.name, "store": str(store.root), "memory_bytes": most, "steps": rows}
        click.echo(json.dumps(document, indent=2))
        return
    shown = [
        (
            row["step"],
            row["stage"],
            row["state"],
            "" if row["state"] == "miss" else megabytes(size_bytes),
            megabytes(state.step.memory_bytes) if row["state"] == "miss" else "",
            row["reason"],
        )
        for row, state, size_bytes in zip(rows, states, sizes, strict=True)
    ]
    click.echo(table(("STEP", "STAGE", "STATE", "SIZE", "MEMORY", "REASON"), shown))
    missing = [state for state in states if not state.hit and state.step.key not in there]
    hits = sum(state.hit for state in states)
    shared = f", {len(there)} in the shared store" if there else ""
    click.echo(f"\n{len(missing)} of {len(states)} steps to run, {hits} in the store at {store.root}{shared}")
    if missing:
        need = max(state.step.memory_bytes for state in missing)
        click.echo(f"memory: up to {megabytes(need)} a step" + (f", of {megabytes(most)} here" if most else ""))
