"""A link that a build made costs the next build nothing, and vouches for nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.run.linked import note_links
from pipeline.store import Entry, Store
from tests.test_store import KEY, put


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    put(store)
    return store


def entry(store: Store) -> Entry:
    found = store.get(KEY)
    assert found
    time.sleep(0.02)  # more than a tick of the clock that stamps files
    return found


def refuse(path: Path) -> str:
    raise AssertionError(f"{path} was hashed")


def test_a_linked_file_is_not_hashed_again(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = entry(store)
    os.link(found.out / "sub/file", tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.store.sha256_file", refuse)
        with pytest.raises(AssertionError, match="was hashed"):
            store.get(KEY)
        note_links(store, [found])
        assert store.get(KEY)


def test_what_else_happened_to_a_linked_file_is_seen(store: Store, tmp_path: Path) -> None:
    found = entry(store)
    os.link(found.out / "sub/file", tmp_path / "other")
    (tmp_path / "other").chmod(0o644)
    (tmp_path / "other").write_text("hellp")
    note_links(store, [found])
    assert store.get(KEY) is None and store.corrupt[KEY] == "sub/file has changed"


def test_a_file_without_other_names_is_looked_at(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    found = entry(store)
    (found.out / "sub/file").chmod(0o400)
    note_links(store, [found])
    monkeypatch.setattr("pipeline.store.sha256_file", refuse)
    with pytest.raises(AssertionError, match="was hashed"):
        store.get(KEY)


def test_a_result_that_is_gone_is_no_error(store: Store) -> None:
    found = entry(store)
    (found.out / "sub/file").unlink()
    note_links(store, [found])
    assert store.get(KEY) is None
