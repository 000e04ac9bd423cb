"""One thread that runs the engine: requests join and leave the running batch at every step, in the order they came.

The engine is called from this thread alone. What it finds out goes to each request's `deliver`, which must return at
once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pipeline.decoding import Ask, Batch, Decoder, Piece
from pipeline.engine import Sampling
from pipeline.serve.problems import Busy, Draining

T = TypeVar("T")
Deliver = Callable[[Sequence[Piece] | Exception], None]


@dataclass(eq=False)
class Job:
    """The continuations of one prompt that are wanted. `Piece.key` is (this job, place of the continuation in it)."""

    prompt: Sequence[int]
    sampling: Sampling
    choices: int
    limit: int
    """The most tokens of each, at least 1."""
    eos: frozenset[int]
    deliver: Deliver
    """Called in the engine's thread, with tokens or with what ended the job."""
    cancelled: bool = False
    unwanted: list[int] = field(default_factory=list)
    """Choices that are left out from the next step on."""
    left: set[Hashable] = field(default_factory=set)
    """Continuations that go on."""

    @property
    def rows(self) -> int:
        """Of the batch, at most."""
        return self.choices * self.sampling.beams

    @property
    def tokens(self) -> int:
        """Of the cache, at most."""
        return self.rows * (len(self.prompt) + self.limit)


class Scheduler:
    """The queue, and the thread that empties it. `most_waiting` jobs may wait; one more raises Busy."""

    def __init__(self, decoder: Decoder | None, *, most_rows: int, most_waiting: int) -> None:
        self._decoder = decoder
        self._batch = Batch(decoder.stepper) if decoder else None
        self.most_rows = min(most_rows, (decoder and decoder.most_rows) or most_rows)
        self._most_waiting = most_waiting
        self._waiting: deque[Job | tuple[Callable[[], Any], Future[Any]]] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._told = False  # something that the engine's thread has to see before its next step
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs in the batch."""
        return len(self._running)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none. Raises Busy when the queue has no room, Draining when the server ends."""
        with self._changed:
            self._admit(len(jobs))
            self._waiting += jobs
            self._tell()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run something else with the engine, between two steps. Raises as `submit`."""
        future: Future[T] = Future()
        with self._changed:
            self._admit(1)
            self._waiting.append((function, future))
            self._tell()
        return future

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more: their rows leave the batch before the next step."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._tell()

    def drop(self, job: Job, choice: int) -> None:
        """Nobody waits for one choice of a job any more."""
        with self._changed:
            job.unwanted.append(choice)
            self._tell()

    def stop(self) -> None:
        """Refuse what is new, finish what is queued, end the thread."""
        with self._changed:
            self._stopping = True
            self._tell()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread's end; whether it came."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _tell(self) -> None:
        self._told = True
        self._changed.notify()

    def _admit(self, count: int) -> None:
        if self._stopping:
            raise Draining("the server is shutting down")
        if len(self._waiting) + count > self._most_waiting and (self._waiting or self._running):
            raise Busy(f"{len(self._waiting)} requests are waiting already, {self._most_waiting} at most")

    # in the engine's thread

    def _run(self) -> None:
        while True:
            # A small model's step takes a third of a millisecond: nothing is looked at that has not changed.
            while self._running and not self._told:
                self._step()
            with self._changed:
                while not (self._waiting or self._running or self._stopping):
                    self._changed.wait()
                self._told = False
                if self._stopping and not (self._waiting or self._running):
                    return
                for job in self._running[:]:
                    self._leave(job)
                begin = self._next()
            for each in begin:
                self._begin(each)
            self._step()

    def _next(self) -> list[Any]:
        """What of the queue is begun now: in order, as far as it fits."""
        found: list[Any] = []
        rows = sum(job.rows for job in self._running)
        tokens = sum(job.tokens for job in self._running)
        most = self._decoder.most_tokens if self._decoder else None
        while self._waiting:
            each = self._waiting[0]
            if isinstance(each, Job) and not each.cancelled:
                rows, tokens = rows + each.rows, tokens + each.tokens
                full = rows > self.most_rows or bool(most and tokens > most)
                assert self._batch is not None
                if (full or not self._batch.open) and (self._running or any(isinstance(b, Job) for b in found)):
                    break
            found.append(self._waiting.popleft())
        return found

    def _begin(self, each: Job | tuple[Callable[[], Any], Future[Any]]) -> None:
        if not isinstance(each, Job):
            function, future = each
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
            return
        if each.cancelled:
            return
        assert self._batch is not None
        each.left = {(each, choice) for choice in range(each.choices)}
        asks = [
            Ask((each, choice), 0, each.prompt, each.sampling, each.limit, each.eos, choice)
            for choice in range(each.choices)
        ]
        try:
            pieces = self._batch.add([each.prompt], asks)
        except Exception as error:
            each.deliver(error)
            return
        self._running.append(each)
        self._give(pieces)

    def _step(self) -> None:
        if self._batch is None or not self._running:
            return
        try:
            pieces = self._batch.advance()
        except Exception as error:  # the batch is lost, the server is not
            assert self._decoder is not None
            lost, self._running = self._running, []
            self._batch = Batch(self._decoder.stepper)
            for job in lost:
                job.deliver(error)
            return
        self._give(pieces)

    def _give(self, pieces: Sequence[Piece]) -> None:
        by_job: dict[Job, list[Piece]] = {}
        for piece in pieces:
            key: Any = piece.key  # as `_begin` made it
            job = key[0]
            by_job.setdefault(job, []).append(piece)
            if piece.finished:
                job.left.discard(piece.key)
        for job, mine in by_job.items():
            job.deliver(mine)
            if not job.left:
                self._running.remove(job)
                if self._waiting:  # there is room
                    self._told = True

    def _leave(self, job: Job) -> None:
        assert self._batch is not None
        gone = set(job.left) if job.cancelled else job.left & {(job, choice) for choice in job.unwanted}
        job.unwanted.clear()
        for key in gone:
            self._batch.drop(key)
        job.left -= gone
        if not job.left:
            self._running.remove(job)
