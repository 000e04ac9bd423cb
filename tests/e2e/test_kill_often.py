"""`kill -9` at random moments across a whole build: of the builder, of a worker, and of both at once.

A build has no other process that holds the store or its locks: the builder holds the locks and puts results in place,
the worker writes into the scratch directory. Both killed at once is what a machine does that stops.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.harness import ALL_TARGETS, Running, Site, command, wait_for
from tests.e2e.test_kill import gone

RECIPE = ALL_TARGETS.partition("  cpu-int8:")[0] + "  plain:\n    runtime: copy\n"
VICTIMS = ("builder", "worker", "machine")
SEED = 20261126
SLOW = "reference"
"""The one long stage, torch's. It is built anew in one round of eight."""


def strike(build: Running, victim: str) -> bool:
    """Kill. Whether there was something to kill."""
    workers = build.workers()
    pids = {"builder": [build.pid], "worker": workers[:1], "machine": [build.pid, *workers]}[victim]
    alive = [] if build.ended else pids
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(alive)


def fresh(whole: Site, place: Path, *, long: bool) -> Site:
    """An empty store, or one that holds what takes long."""
    site = Site(whole.root, place / "cache", place / "out", whole.env)
    for path in () if long else [*whole.entries(SLOW), *whole.entries("fetch")]:
        shutil.copytree(path, site.cache / "results" / path.name)
    return site


def killed_often(whole: Site, place: Path, rounds: int, seed: int) -> Counter[str]:
    """Builds from scratch, each killed once at a moment of the whole build, and built again, until as many as `rounds`
    kills met somebody alive; by victim.

    Asserts after each kill that what is published is whole, and after each second build that the ids are those of a
    build that was left alone, that the store holds nothing corrupt, and that `cache gc` leaves no temporary file.
    """
    expected = whole.ids()
    dice, met, lasts = random.Random(seed), Counter[str](), {}
    for long in (True, False):
        site, started = fresh(whole, place, long=long), time.monotonic()
        assert site.made() == expected
        lasts[long] = time.monotonic() - started
        shutil.rmtree(place)
    for number in range(4 * rounds):
        if met.total() == rounds:
            break
        victim, long = VICTIMS[met.total() % 3], met.total() % 8 == 0
        site = fresh(whole, place, long=long)
        build = site.start("--jobs", dice.choice("12"))
        time.sleep(dice.uniform(0, lasts[long]))
        if victim == "worker":  # between two steps there is none
            wait_for(lambda build=build: build.workers() or build.ended, "a worker")
        workers = build.workers()
        met[victim] += strike(build, victim)
        code = build.end().code
        assert code in ({"worker": (0, 3)}.get(victim, (0, -signal.SIGKILL))), (number, victim, code)
        wait_for(lambda workers=workers: gone(workers), "the workers die with their builder")
        assert all(expected[name] == identity for name, identity in site.ids().items())
        assert site.made() == expected == site.ids(), (number, victim)
        verified = command("enginewright", "cache", "verify", "--cache", site.cache)
        assert verified.code == 0, verified.out
        assert command("enginewright", "cache", "gc", "--older-than", "1d", "--cache", site.cache).code == 0
        assert not site.leftovers(), (number, victim)
        assert not list(site.cache.rglob(".*")), "a temporary file"
        shutil.rmtree(place)
    return met


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A build that nobody disturbed."""
    site = Site.write(tmp_path_factory.mktemp("whole"), RECIPE)
    site.made()
    return site


def test_kill_9_at_six_moments(whole: Site, tmp_path: Path) -> None:
    assert killed_often(whole, tmp_path / "killed", 6, SEED + 99) == dict.fromkeys(VICTIMS, 2)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_kill_9_at_200_moments(part: int, whole: Site, tmp_path: Path) -> None:
    """Twenty in each part."""
    assert killed_often(whole, tmp_path / "killed", 20, SEED + part).total() == 20
