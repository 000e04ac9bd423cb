"""Run the steps of a plan and show how they go, here or on a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

from pipeline.cli.console import listening
from pipeline.cli.prepare import Prepared
from pipeline.errors import RecipeError, StageError
from pipeline.run.budget import Budget
from pipeline.run.local import Runner
from pipeline.run.once import Event
from pipeline.run.status import Status
from pipeline.store import Entry, Store

if TYPE_CHECKING:
    from pipeline.shared import Shared


def run(
    prepared: Prepared,
    store: Store,
    states: Sequence[Status],
    limits: Budget,
    *,
    where: str = "local",
    shared: Shared | None = None,
    stream: IO[str] | None = None,
    quiet: bool = False,
) -> tuple[dict[str, Entry], dict[str, Event]]:
    """Results by key, and by key the event that tells what each cost. `states` are those of the plan's steps.

    Raises the first step's error, which then names the sources by their places.
    """
    missing = [state.step.label for state in states if not state.hit]
    costs: dict[str, Event] = {}
    with listening(missing, stream, quiet=quiet) as show:

        def listen(event: Event) -> None:
            if event["event"] in ("done", "hit"):
                costs[event["key"]] = event
            show(event)

        chains = prepared.recipe.toolchains
        try:
            if where == "local":
                spared = frozenset(state.step.key for state in states if state.thin)
                return Runner(store, listen, chains, limits, shared, spared).run(prepared.plan), costs
            from pipeline.run.ray import RayRunner

            nodes = {"url": shared.url, "read_only": shared.read_only} if shared else None
            address = where.removesuffix("ray")
            return RayRunner(store, listen, chains, limits, address, shared, nodes).run(prepared.plan), costs
        except (RecipeError, StageError) as error:
            # A stage knows its inputs by role: `model`, `data.txt`. The user knows them by path.
            sources = {"model": prepared.job.sources.model, **prepared.job.sources.data}
            named = (f"{role} is {source.uri}" for role, source in sources.items())
            error.hint = f"{error.hint}\nwhere {', '.join(named)}".lstrip()
            raise
