"""Several transfers at once: in order, each told of, and ended by the first error."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.errors import VerificationError
from pipeline.registry.crew import together
from pipeline.registry.repository import Advance


def test_results_are_in_order_and_every_byte_is_told() -> None:
    told: list[int] = []

    def work(item: int, advance: Advance) -> int:
        time.sleep(0.002 * (9 - item))
        advance(item)
        return item * item

    assert together(work, list(range(10)), told.append, 4) == [item * item for item in range(10)]
    assert sorted(told) == list(range(10))


def test_as_many_at_once_as_are_allowed() -> None:
    now, most, lock = 0, 0, threading.Lock()

    def work(item: int, advance: Advance) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1

    together(work, list(range(12)), lambda size: None, 3)
    assert most == 3
    most = 0
    together(work, list(range(3)), lambda size: None, 1)
    assert most == 1


@pytest.mark.parametrize("error", [VerificationError("wrong"), KeyboardInterrupt()])
def test_the_first_error_ends_the_others(error: BaseException) -> None:
    """One that would take for ever ends at its next block, and what has not begun does not begin."""
    begun: list[int] = []

    def work(item: int, advance: Advance) -> None:
        begun.append(item)
        if item == 1:
            time.sleep(0.05)
            raise error
        for _ in range(100_000):
            advance(1)
            time.sleep(0.001)

    with pytest.raises(type(error)):
        together(work, list(range(50)), lambda size: None, 2)
    assert set(begun) == {0, 1}
