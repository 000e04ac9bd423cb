"""Several transfers at once: the many small files of an artifact must not wait for each other's round trips."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from pipeline.registry.repository import Advance

T = TypeVar("T")
R = TypeVar("R")


class StoppedError(Exception):
    """Another transfer failed, or the user wants to end: this one ends at its next block."""


def together(work: Callable[[T, Advance], R], items: Sequence[T], advance: Advance, workers: int) -> list[R]:
    """`work(item, advance)` of every item, in their order, `workers` at a time.

    The first error ends all of it, and is raised; so does an interruption, within a block.
    """
    if workers == 1 or len(items) < 2:
        return [work(item, advance) for item in items]
    stop, lock = threading.Event(), threading.Lock()
    failed: list[BaseException] = []

    def step(size: int) -> None:
        if stop.is_set():
            raise StoppedError
        with lock:
            advance(size)

    def run(item: T) -> R:
        if stop.is_set():
            raise StoppedError
        try:
            return work(item, step)
        except StoppedError:
            raise
        except BaseException as error:
            failed.append(error)
            stop.set()
            raise

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            if failed:
                raise failed[0]
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]
