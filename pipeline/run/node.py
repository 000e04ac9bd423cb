"""A step on a node of a Ray cluster: what the builder's task runs there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.errors import EnginewrightError, StageError, UnavailableError
from pipeline.plain import from_plain
from pipeline.plan import PlannedStep
from pipeline.run import toolchain
from pipeline.run.child import Children
from pipeline.run.once import Beyond, Event, Once
from pipeline.run.worker import load
from pipeline.store import Store

SHARED = "pipeline.shared:open_shared"
"""What opens a shared store; by name, for it stands above this package."""
TRAVEL = (
    "results reach other nodes through a shared store that all may write, --shared URL, or a folder that every node "
    "sees, --cache DIR"
)

Job = Mapping[str, Any]
"""What a node is told: a step in plain values, the store, and what it must find there."""


def perform(job: Job) -> dict[str, Any]:
    """A task, on its node: {"node", "events", "error"?}. Errors that a user can mend come back as values."""
    events: list[Event] = []
    node = _here()
    try:
        step = _step(job)
        store = Store(Path(job["store"]) if job["store"] else None)
        beyond: Beyond | None = load(SHARED)(**job["shared"]) if job["shared"] else None
        inputs = {role: _input(store, beyond, key, node) for role, key in step.needs.items()}
        once = Once(store, events.append, Children(store.root / "logs", job["toolchains"]), beyond)
        once.run(step, inputs, job["threads"])
    except EnginewrightError as error:
        told = {"exit_code": error.exit_code, "message": error.message, "hint": error.hint}
        return {"node": node, "events": [], "error": told}
    return {"node": node, "events": [dict(event, node=node) for event in events if event["event"] != "progress"]}


def _step(job: Job) -> PlannedStep:
    """The step of a job, if this node has the very versions that its key names."""
    if job["version"] != __version__:
        raise UnavailableError(f"this node has enginewright {__version__}, the builder {job['version']}")
    stage = load(job["stage"])
    for tool, wanted in job["key_text"]["tools"].items():
        found = toolchain.version(tool, stage.toolchain, job["toolchains"])
        if found != wanted:
            raise UnavailableError(
                f"this node has {tool} {found}, the builder {wanted}",
                hint="every node needs the environment of the builder: one image for all",
            )
    options = from_plain(load(job["options_type"]), job["options"])
    texts = (job["needs"], job["key"], job["key_text"], tuple(job["targets"]), job["memory_bytes"])
    return PlannedStep(job["name"], stage, options, *texts)


def _input(store: Store, beyond: Beyond | None, key: str, node: str) -> Path:
    notes: list[str] = []
    entry = store.get(key)
    if entry is None and beyond:
        with store.locked(key):
            entry = store.get(key) or beyond.fetch(key, store, notes.append)
    if entry is None:
        where = "the shared store" if beyond else f"the store at {store.root}"
        told = f": {notes[0]}" if notes else ""
        raise StageError(f"{key} is not in {where} as {node} sees it{told}", hint=TRAVEL)
    return entry.out


def _here() -> str:
    """The id of this node, as `ray list nodes` shows it."""
    import ray

    return str(ray.get_runtime_context().get_node_id())
