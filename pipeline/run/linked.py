"""After a build that linked files of its results: note their new times of change, or the next build hashes them all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from pipeline.store import Entry, Store, stat_of


def note_links(store: Store, entries: Iterable[Entry]) -> None:
    """Record the time of change of every file that has other names, where that alone differs from the record.

    A link moves a file's time of change, and nothing else of it. The entries are those that this build has looked at:
    what was changed before it, with its time of modification put back, `Store.get` has found.
    """
    for entry in entries:
        with contextlib.suppress(OSError):  # a read-only store, or a result that is gone: the next build looks
            moved = [_moved(entry, file) for file in entry.files if not file.get("dropped")]
            if any(moved):
                store.note(entry)


def _moved(entry: Entry, file: dict[str, Any]) -> bool:
    """Whether a link has moved a file's time of change, which then is recorded."""
    path, (modified, changed, inode, size) = entry.out / file["path"], file["stat"]
    now = stat_of(path)
    if now[1] == changed or now != [modified, now[1], inode, size] or path.stat().st_nlink == 1:
        return False
    file["stat"] = now
    return True
