"""Run a plan on this machine: every missing step in a child process, independent steps side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from pipeline.plan import Plan
from pipeline.run.budget import Budget
from pipeline.run.child import Children
from pipeline.run.once import Beyond, Event, Once
from pipeline.run.queue import Queue
from pipeline.store import Entry, Store


@dataclass
class Runner:
    """Where and how steps run. `on_event` is called from several threads, one at a time."""

    store: Store
    on_event: Callable[[Event], None]
    toolchains: Mapping[str, str]
    budget: Budget = field(default_factory=Budget)
    beyond: Beyond | None = None
    spared: frozenset[str] = frozenset()
    """Keys of results that need not be whole: see `status`."""

    def run(self, plan: Plan) -> dict[str, Entry]:
        """Results by key. The first failure ends the run: steps under way are stopped, finished ones are kept."""
        logs = self.store.root / "logs"
        once = Once(self.store, self.on_event, Children(logs, self.toolchains), self.beyond, self.spared)
        done: dict[str, Entry] = {}
        queue, running = Queue(plan), dict[str, int]()
        futures: dict[Future[Entry], str] = {}
        with ThreadPoolExecutor(self.budget.jobs) as pool:
            try:
                while len(done) < len(plan.steps):
                    starting = []
                    while step := queue.take(lambda next: self.budget.admits(next.memory_bytes, running)):
                        running[step.key] = step.memory_bytes
                        starting.append(step)
                    for step in starting:
                        inputs = {role: done[key].out for role, key in step.needs.items()}
                        futures[pool.submit(once.run, step, inputs, self.budget.threads(len(running)))] = step.key
                    for future in wait(futures, return_when=FIRST_COMPLETED).done:
                        key = futures.pop(future)
                        del running[key]
                        done[key] = future.result()
                        queue.finish(key)
            except BaseException:
                once.stop()
                raise
        return done
