"""Run a plan on this machine: every missing step in a child process, independent steps side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import EnginewrightError, StageError
from pipeline.plan import Plan, PlannedStep
from pipeline.run.child import Children
from pipeline.store import Entry, Store

Event = Mapping[str, Any]
"""{"event": "start" | "progress" | "done" | "hit" | "failed", "step": label, "key": key, ...}"""


@dataclass
class Runner:
    """Where and how steps run. `on_event` is called from several threads, one at a time."""

    store: Store
    on_event: Callable[[Event], None]
    toolchains: Mapping[str, str]
    jobs: int = 1

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._children = Children(self.store.root / "logs", self.toolchains, self.jobs)

    def run(self, plan: Plan) -> dict[str, Entry]:
        """Results by key. The first failure ends the run: steps under way are stopped, finished ones are kept."""
        done: dict[str, Entry] = {}
        waiting = list(plan.steps)
        running: dict[Future[Entry], str] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                while waiting or running:
                    ready = [step for step in waiting if all(key in done for key in step.needs.values())]
                    for step in ready[: max(0, self.jobs - len(running))]:
                        waiting.remove(step)
                        inputs = {role: done[key].out for role, key in step.needs.items()}
                        running[pool.submit(self._step, step, inputs)] = step.key
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        done[running.pop(future)] = future.result()
            except BaseException:
                self._children.stop()
                raise
        return done

    def _step(self, step: PlannedStep, inputs: Mapping[str, Path]) -> Entry:
        if entry := self.store.get(step.key):
            self._tell("hit", step, size_bytes=entry.size_bytes)
            return entry
        run: dict[str, Any] = {}
        try:
            with self.store.locked(step.key):
                if entry := self.store.get(step.key):  # another builder was here first
                    self._tell("hit", step, size_bytes=entry.size_bytes)
                    return entry
                if why := self.store.corrupt.get(step.key):
                    self._tell("corrupt", step, reason=why)
                self._tell("start", step)
                again = step.stage.resumable
                with self.store.adding(step.key, dict(step.key_text), run, resumable=again) as out:
                    run.update(self._children.run(step, inputs, out, lambda said: self._progress(step, said)))
        except OSError as error:
            failure = StageError(f"{step.label}: {error.strerror} ({error.filename or self.store.root})")
            self._tell("failed", step, message=str(failure))
            raise failure from error
        except EnginewrightError as error:
            self._tell("failed", step, message=str(error))
            raise
        entry = self.store.get(step.key)
        if entry is None:
            raise StageError(f"{step.label}: its result vanished: {self.store.corrupt.get(step.key, 'removed')}")
        self._tell("done", step, size_bytes=entry.size_bytes, **run)
        return entry

    def _progress(self, step: PlannedStep, said: list[Any]) -> None:
        self._tell("progress", step, done=said[0], total=said[1], note=said[2])

    def _tell(self, event: str, step: PlannedStep, **more: Any) -> None:
        with self._lock:
            self.on_event({"event": event, "step": step.label, "key": step.key, **more})
