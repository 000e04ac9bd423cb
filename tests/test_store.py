"""The store keeps whole results or none."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.errors import StageError, UnavailableError
from pipeline.store import Store, open_store

KEY = "test.write-" + "0" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def put(store: Store, key: str = KEY, text: str = "hello") -> None:
    with store.locked(key), store.adding(key, {"kind": "step"}, {"wall_s": 1.0}) as out:
        (out / "sub").mkdir()
        (out / "sub" / "file").write_text(text)


def test_a_result_is_found_with_its_digest_and_cost(store: Store) -> None:
    assert store.get(KEY) is None
    put(store)
    entry = store.get(KEY)
    assert entry is not None
    assert (entry.out / "sub/file").read_text() == "hello"
    assert entry.files[0]["digest"] == "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert entry.run == {"wall_s": 1.0}
    assert entry.size_bytes == 5
    assert store.key_text(KEY) == {"kind": "step"}


def test_a_failed_block_leaves_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError), store.locked(KEY), store.adding(KEY, {}, {}) as out:
        (out / "file").write_text("x")
        raise RuntimeError
    assert store.get(KEY) is None
    assert KEY not in store.corrupt
    assert not list((store.root / "scratch").iterdir())


def damage_cut(file: Path) -> None:
    os.truncate(file, 2)


def damage_byte(file: Path) -> None:
    file.write_text("hellp")


def damage_byte_quietly(file: Path) -> None:
    """One byte, with size and modification time as they were."""
    before = file.stat()
    file.write_text("hellp")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def damage_delete(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [damage_cut, damage_byte, damage_byte_quietly, damage_delete])
def test_damage_is_a_miss_and_is_told(store: Store, damage: object) -> None:
    put(store)
    file = store.path(KEY) / "out/sub/file"
    file.chmod(0o644)
    assert callable(damage)
    damage(file)
    assert store.get(KEY) is None
    assert "sub/file" in store.corrupt[KEY]
    put(store)
    assert store.get(KEY) is not None
    assert KEY not in store.corrupt


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3, "run": {}}'])
def test_a_damaged_record_is_a_miss(store: Store, text: str) -> None:
    put(store)
    record = store.path(KEY) / "entry.json"
    record.write_text(text)
    assert store.get(KEY) is None
    assert KEY in store.corrupt


def test_a_linked_file_is_still_trusted_and_a_touched_one_hashed_again(store: Store, tmp_path: Path) -> None:
    put(store)
    os.link(store.path(KEY) / "out/sub/file", tmp_path / "link")
    assert store.get(KEY) is not None
    os.utime(store.path(KEY) / "out/sub/file")
    assert store.get(KEY) is not None


def test_a_killed_builder_leaves_a_miss_and_the_next_one_clears_up(store: Store) -> None:
    code = (
        "import sys, os, signal, pathlib\n"
        "from pipeline.store import Store\n"
        f"store = Store(pathlib.Path({str(store.root)!r}))\n"
        f"with store.locked({KEY!r}), store.adding({KEY!r}, {{}}, {{}}) as out:\n"
        "    (out / 'file').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert store.get(KEY) is None
    assert len(list((store.root / "scratch").iterdir())) == 1
    put(store)
    assert store.get(KEY) is not None
    assert not list((store.root / "scratch").iterdir())


def test_the_second_builder_waits_for_the_first(store: Store) -> None:
    order: list[str] = []

    def first() -> None:
        with store.locked(KEY):
            order.append("first in")
            time.sleep(0.3)
            order.append("first out")

    thread = threading.Thread(target=first)
    thread.start()
    while not order:
        time.sleep(0.01)
    with Store(store.root).locked(KEY):
        order.append("second in")
    thread.join()
    assert order == ["first in", "first out", "second in"]


def test_what_is_used_is_not_removed(store: Store) -> None:
    put(store)
    with store.using([KEY]), Store(store.root).using([KEY]):
        assert not Store(store.root).remove(KEY)
        assert store.get(KEY) is not None
    assert store.remove(KEY)
    assert store.get(KEY) is None


def test_a_store_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "locks").write_text("in the way")
    with pytest.raises(StageError, match="cannot be written") as error, Store(tmp_path / "store").locked(KEY):
        pass
    assert "--cache" in error.value.hint
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="is a file"):
        open_store(tmp_path / "file")


def test_what_was_built_last_is_remembered_by_recipe(store: Store) -> None:
    assert store.last("a") == {}
    store.remember("a", {"cpu/engine": "k1"})
    store.remember("a", {"gpu/engine": "k2"})
    assert store.last("a") == {"cpu/engine": "k1", "gpu/engine": "k2"}
    assert store.last("b") == {}
