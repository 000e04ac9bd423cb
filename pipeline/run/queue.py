"""The order in which the steps of a plan may begin, wherever they run."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from pipeline.plan import Plan, PlannedStep


def ranks(plan: Plan) -> dict[str, tuple[int, int]]:
    """Key -> its place in the queue, lowest first: by how many steps rest on it, then in plan order.

    What most others wait for begins first: the reference, on which every parity rests, before the engine of one target.
    The order depends on nothing but the plan.
    """
    number = {step.key: place for place, step in enumerate(plan.steps)}
    resting = [0] * len(plan.steps)  # bit n of a step's set: the step with number n rests on it
    for step in reversed(plan.steps):
        above = resting[number[step.key]] | 1 << number[step.key]
        for key in step.needs.values():
            resting[number[key]] |= above
    return {key: (-resting[place].bit_count(), place) for key, place in number.items()}


class Queue:
    """The steps of a plan: each may be taken once all that it needs is finished."""

    def __init__(self, plan: Plan) -> None:
        self._rank, self._by_key = ranks(plan), plan.by_key()
        self._missing = {step.key: set(step.needs.values()) for step in plan.steps}
        self._behind: dict[str, list[str]] = {key: [] for key in self._by_key}
        for step in plan.steps:
            for key in self._missing[step.key]:
                self._behind[key].append(step.key)
        self._ready = [(self._rank[key], key) for key, needs in self._missing.items() if not needs]
        heapq.heapify(self._ready)

    def take(self, admits: Callable[[PlannedStep], bool]) -> PlannedStep | None:
        """The next step, if `admits` lets it begin now. One that is not let in is not overtaken: it would starve."""
        if not self._ready or not admits(self._by_key[self._ready[0][1]]):
            return None
        return self._by_key[heapq.heappop(self._ready)[1]]

    def finish(self, key: str) -> None:
        """What waited for this step alone may begin."""
        for later in self._behind[key]:
            self._missing[later].discard(key)
            if not self._missing[later]:
                heapq.heappush(self._ready, (self._rank[later], later))
