"""One step, once: taken from the store, or run under its lock, whoever else builds at the same time."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import EnginewrightError, StageError
from pipeline.plan import PlannedStep
from pipeline.run.child import Children
from pipeline.store import Entry, Store

Event = Mapping[str, Any]
"""{"event": "start" | "progress" | "done" | "hit" | "failed", "step": label, "key": key, ...}"""


class Beyond(Protocol):
    """A store behind the store, which builders on several machines have in common (`pipeline.shared`)."""

    def fetch(self, key: str, store: Store, tell: Callable[[str], None]) -> Entry | None:
        """The result of a key, brought into `store`; None where it is not there."""
        ...

    def offer(self, entry: Entry, store: Store, tell: Callable[[str], None]) -> Entry:
        """Let others have a result. The one that holds from now on: another builder's, where that was first."""
        ...


@dataclass
class Once:
    """Steps of one builder on one machine. `on_event` is called from several threads, one at a time."""

    store: Store
    on_event: Callable[[Event], None]
    children: Children
    beyond: Beyond | None = None
    spared: frozenset[str] = frozenset()
    """Keys of results whose large files were dropped and that nobody will read."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def run(self, step: PlannedStep, inputs: Mapping[str, Path], threads: int) -> Entry:
        """The step's result. Raises its error; nothing half-made is kept."""
        if self.beyond is None and (entry := self.store.get(step.key, thin=step.key in self.spared)):
            self._tell("hit", step, size_bytes=entry.size_bytes)
            return entry
        run: dict[str, Any] = {}
        try:
            with self.store.locked(step.key, self._stopped.is_set):
                if entry := self._found(step):  # here, or another builder was first
                    return entry
                if why := self.store.corrupt.get(step.key):
                    self._tell("corrupt", step, reason=why)
                self._tell("start", step)
                again = step.stage.resumable
                with self.store.adding(step.key, dict(step.key_text), run, resumable=again) as out:
                    run.update(self.children.run(step, inputs, out, lambda said: self._progress(step, said), threads))
                entry = self.store.get(step.key)
                if entry and self.beyond:
                    entry = self.beyond.offer(entry, self.store, lambda said: self._tell("note", step, note=said))
        except OSError as error:
            failure = StageError(f"{step.label}: {error.strerror} ({error.filename or self.store.root})")
            if error.errno == errno.ENOSPC:  # of this process: a stage says itself what it needs
                failure = StageError(
                    f"{step.label}: no space left on the disk of {self.store.root}: not even what belongs to it",
                    hint="free some space, or give another --cache DIR",
                )
            self._tell("failed", step, message=str(failure))
            raise failure from error
        except EnginewrightError as error:
            self._tell("failed", step, message=str(error))
            raise
        if entry is None:
            raise StageError(f"{step.label}: its result vanished: {self.store.corrupt.get(step.key, 'removed')}")
        self._tell("done", step, size_bytes=entry.size_bytes, **run)
        return entry

    def _found(self, step: PlannedStep) -> Entry | None:
        """The step's result, if it is in the store or can be had from the one behind it."""
        if entry := self.store.get(step.key, thin=step.key in self.spared):
            if self.beyond and entry.whole:
                entry = self.beyond.offer(entry, self.store, lambda said: self._tell("note", step, note=said))
            self._tell("hit", step, size_bytes=entry.size_bytes)
        elif self.beyond:
            entry = self.beyond.fetch(step.key, self.store, lambda said: self._tell("note", step, note=said))
            if entry:
                self._tell("hit", step, size_bytes=entry.size_bytes, shared=True)
        return entry

    def stop(self) -> None:
        """End the steps under way, and those that wait for another builder."""
        self._stopped.set()
        self.children.stop()

    def _progress(self, step: PlannedStep, said: list[Any]) -> None:
        self._tell("progress", step, done=said[0], total=said[1], note=said[2])

    def _tell(self, event: str, step: PlannedStep, **more: Any) -> None:
        with self._lock:
            self.on_event({"event": event, "step": step.label, "key": step.key, **more})
