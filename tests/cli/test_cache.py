"""`enginewright cache`: what is removed, and what stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cli.cache import duration, leftovers, results, size
from pipeline.errors import RecipeError
from pipeline.store import Store
from tests.test_store import put

KEYS = [f"test.write-{digit * 64}" for digit in "123"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three results, of which the first has not been used for longest."""
    store = Store(tmp_path / "store")
    for age, key in enumerate(KEYS):
        put(store, key, "x" * 1000)
        os.utime(store.path(key), (time.time() - 100 + age, time.time() - 100 + age))
    return store


def test_the_least_recently_used_first(store: Store) -> None:
    assert results(store, older_than_s=3600) == []
    total = sum(f.stat().st_size for key in KEYS for f in store.path(key).rglob("*") if f.is_file())
    assert [key for key, _ in results(store, max_bytes=total - 1)] == KEYS[:1]
    assert list(store.entries()) == KEYS[1:]
    results(store)
    assert list(store.entries()) == []


def test_what_a_build_uses_stays(store: Store) -> None:
    with store.using(KEYS[1:2]):
        assert [key for key, _ in results(store)] == [KEYS[0], KEYS[2]]
    assert [key for key, _ in results(store)] == [KEYS[1]]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(store: Store) -> None:
    for key in KEYS[:2]:
        (store.root / "scratch" / f"{key}.0123abcd" / "out").mkdir(parents=True)
    with store.locked(KEYS[0]):
        assert [name for name, _ in leftovers(store)] == [f"{KEYS[1]}.0123abcd"]
    assert [name for name, _ in leftovers(store)] == [f"{KEYS[0]}.0123abcd"]
    assert list(store.entries()) == KEYS


@pytest.mark.parametrize(("text", "value"), [("500MB", 500_000_000), ("1.5 k", 1500), ("7", 7), ("2T", 2 * 10**12)])
def test_sizes(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize(("text", "value"), [("30d", 2592000), ("1.5h", 5400), ("0s", 0)])
def test_durations(text: str, value: float) -> None:
    assert duration(text) == value


def test_what_is_neither_is_refused() -> None:
    with pytest.raises(RecipeError, match="not a size"):
        size("20 GBytes")
    with pytest.raises(RecipeError, match="not a duration"):
        duration("30")


def test_a_builder_killed_while_it_rewrites_an_entry_leaves_nothing_within_the_result(store: Store) -> None:
    """An entry is rewritten when a file's times have changed: the half-written text lies where `gc` looks."""
    touched = store.path(KEYS[0]) / "out/sub/file"
    os.utime(touched, (1, 1))
    code = (
        "import os, pathlib, signal\n"
        "from pipeline.store import Store\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"Store(pathlib.Path({str(store.root)!r})).get({KEYS[0]!r})\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert not list((store.root / "results").rglob(".*"))
    assert len(list((store.root / "scratch").iterdir())) == 1
    (store.root / f".digests.{2**22 + 1}").write_text("")  # no process has such a number
    (store.root / f".digests.{os.getpid()}").write_text("")
    assert len(leftovers(store)) == 2
    assert not list((store.root / "scratch").iterdir())
    assert [path.name for path in store.root.glob(".*")] == [f".digests.{os.getpid()}"]
    assert store.get(KEYS[0]) is not None
