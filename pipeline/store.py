"""The store: a key -> a directory, whole or absent, whatever is killed when.

Layout under the root: `results/<key>/{out/, key.json, entry.json}`, `locks/`, `scratch/`, `logs/`, `last/`.
`key.json` is the text that was hashed, so that the reason for a miss is a diff of two small files.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from pipeline.digest import sha256_file
from pipeline.errors import StageError, UnavailableError
from pipeline.frozen import frozen
from pipeline.places import default_root

WAIT_S = 0.05
"""Between two looks at a lock that another builder holds."""


@frozen
class Entry:
    """A result: `out` is what the stage wrote, `files` its digests, `run` what the run cost (never part of a key)."""

    key: str
    path: Path
    files: tuple[dict[str, Any], ...]
    run: dict[str, Any]

    @property
    def out(self) -> Path:
        """The stage's own directory."""
        return self.path / "out"

    @property
    def size_bytes(self) -> int:
        """Sum of the files' sizes, as the stage wrote them."""
        return sum(int(file["size"]) for file in self.files)

    @property
    def whole(self) -> bool:
        """Whether every file is still there (see run/lean.py)."""
        return not any(file.get("dropped") for file in self.files)


def stat_of(path: Path) -> list[int]:
    """What changes when a file does: modification and change time in ns, inode, size."""
    s = path.stat()
    return [s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_size]


def _describe(out: Path) -> list[dict[str, Any]]:
    """Every file under `out`, with size, digest and stat, sorted by path."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return [
        {"path": f.relative_to(out).as_posix(), "size": f.stat().st_size, "digest": sha256_file(f), "stat": stat_of(f)}
        for f in files
    ]


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(path.read_bytes()))
    return None


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Store:
    """Results by key under one root directory."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()
        self.corrupt: dict[str, str] = {}
        """key -> what was wrong with an entry that `get` refused."""

    def path(self, key: str) -> Path:
        """Where a key's result is, or would be."""
        return self.root / "results" / key

    def get(self, key: str, *, deep: bool = False, thin: bool = False) -> Entry | None:
        """The result of a key, or None. A changed, cut or missing file is a miss, told in `corrupt`.

        A file whose times, inode and size are as recorded is trusted; any other is hashed again. `deep` hashes all.
        One whose large files were dropped is a miss as well, unless `thin` says that nobody will read them.
        """
        path = self.path(key)
        try:
            record = json.loads((path / "entry.json").read_bytes())
            entry = Entry(key, path, tuple(record["files"]), record["run"])
            known = {file["path"] for file in entry.files}
        except FileNotFoundError:
            if path.exists():
                self.corrupt[key] = "entry.json is missing"
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.corrupt[key] = f"entry.json is unreadable ({error})"
            return None
        there = (file.relative_to(entry.out).as_posix() for file in entry.out.rglob("*") if not file.is_dir())
        if strays := sorted(set(there) - known):
            self.corrupt[key] = f"{strays[0]} does not belong to it"
            return None
        if not entry.whole and not thin:
            return None
        fresh = False
        for file in (file for file in entry.files if not file.get("dropped")):
            try:
                stat = stat_of(entry.out / file["path"])
                if deep or stat != file["stat"]:
                    if stat[3] != file["size"] or sha256_file(entry.out / file["path"]) != file["digest"]:
                        self.corrupt[key] = f"{file['path']} has changed"
                        return None
                    file["stat"], fresh = stat, True
            except OSError as error:
                self.corrupt[key] = f"{file['path']}: {error.strerror}"
                return None
        if fresh:
            with contextlib.suppress(OSError):  # a read-only store is checked again next time
                self.note(entry)
        with contextlib.suppress(OSError):
            os.utime(path)
        return entry

    @contextlib.contextmanager
    def locked(self, key: str, cancelled: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Hold the key's lock; waits for another builder. The kernel drops it when a holder dies.

        `cancelled` is asked while it waits: StageError once it says so, for a build that ends waits for no other.
        """
        with self._lock_file(key) as handle:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if cancelled():
                        raise StageError(f"stopped while another build makes {key}") from None
                    time.sleep(WAIT_S)
            yield

    def _lock_file(self, name: str) -> TextIO:
        try:
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            return (self.root / "locks" / name).open("w")
        except OSError as error:
            raise StageError(
                f"the store at {self.root} cannot be written: {error.strerror}",
                hint="give another place with --cache DIR or ENGINEWRIGHT_CACHE, or make this one writable",
            ) from error

    @contextlib.contextmanager
    def adding(
        self, key: str, key_text: dict[str, Any], run: dict[str, Any], *, resumable: bool = False
    ) -> Iterator[Path]:
        """A scratch directory that becomes the key's result when the block ends well, and is removed when not.

        The caller holds `locked(key)`, so leftovers of the same key belong to nobody and are cleared. `run` is written
        as it is when the block ends. `resumable` keeps the directory of an attempt that was cut off or failed, for the
        next one to go on in; `cache gc` removes it.
        """
        scratch_root = self.root / "scratch"
        if not resumable:
            self._clear(key)
        scratch = scratch_root / f"{key}.{'parts' if resumable else uuid.uuid4().hex[:8]}"
        (scratch / "out").mkdir(parents=True, exist_ok=resumable)
        whole = False
        try:
            yield scratch / "out"
            files = _describe(scratch / "out")
            for file in files:
                path = scratch / "out" / file["path"]
                if path.stat().st_nlink == 1:  # a link to the user's own model keeps its mode
                    path.chmod(0o444)
                _sync(path)
                file["stat"] = stat_of(path)
            self._write(scratch / "key.json", key_text)
            self._write(scratch / "entry.json", {"files": files, "run": run})
            final = self.path(key)
            final.parent.mkdir(exist_ok=True)
            if final.exists():  # corrupt, or the caller would have taken it
                final.rename(scratch_root / f"{key}.{uuid.uuid4().hex[:8]}")
            scratch.rename(final)
            _sync(final.parent)
            self.corrupt.pop(key, None)
            whole = True
        finally:
            if whole or not resumable:
                self._clear(key)

    def _clear(self, key: str) -> None:
        """Delete what lies in the scratch directory of a key; a damaged result may be a file."""
        for leftover in (self.root / "scratch").glob(f"{key}.*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)

    def entries(self) -> Iterator[str]:
        """Every key, in order."""
        results = self.root / "results"
        yield from sorted(path.name for path in results.iterdir()) if results.is_dir() else ()

    def key_text(self, key: str) -> dict[str, Any] | None:
        """What was hashed into a stored key."""
        return _read(self.path(key) / "key.json")

    @contextlib.contextmanager
    def using(self, keys: Iterable[str]) -> Iterator[None]:
        """Keep the results of these keys from being removed while the block runs."""
        with contextlib.ExitStack() as held:
            for key in keys:
                with contextlib.suppress(StageError):  # what cannot be written cannot be removed either
                    fcntl.flock(held.enter_context(self._lock_file(f"{key}.used")), fcntl.LOCK_SH)
            yield

    @contextlib.contextmanager
    def unused(self, key: str) -> Iterator[bool]:
        """Hold a result that no build uses while the block runs; False, and nothing is held, where one does."""
        with self.locked(key), self._lock_file(f"{key}.used") as users:
            try:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def note(self, entry: Entry) -> None:
        """Write what an entry says of its files."""
        self._write(entry.path / "entry.json", {"files": entry.files, "run": entry.run})

    def remove(self, key: str) -> bool:
        """Delete a result, whole: first out of sight, then from the disk. False if a build uses it."""
        with self.unused(key) as free:
            if free:
                trash = self.root / "scratch" / f"{key}.{uuid.uuid4().hex[:8]}"
                trash.parent.mkdir(exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    self.path(key).rename(trash)
                self._clear(key)
        return free

    def remember(self, name: str, keys: dict[str, str]) -> None:
        """Note which keys a recipe's steps had, so that the next plan can say what changed."""
        if keys != self.last(name):
            with contextlib.suppress(OSError):
                (self.root / "last").mkdir(parents=True, exist_ok=True)
                self._write(self.root / "last" / f"{name}.json", {**self.last(name), **keys})

    def last(self, name: str) -> dict[str, str]:
        """Step -> key, of the recipe's last build."""
        return _read(self.root / "last" / f"{name}.json") or {}

    def _write(self, path: Path, value: Any) -> None:
        # Always in `scratch`: who is killed here leaves it where `cache gc` looks, and never within a result.
        scratch, unique = self.root / "scratch", uuid.uuid4().hex[:8]
        scratch.mkdir(exist_ok=True)
        within = path.is_relative_to(scratch)
        temporary = path.with_name(f".{path.name}.{unique}") if within else scratch / f"{path.parent.name}.{unique}"
        with temporary.open("w", encoding="utf-8") as handle:
            json.dump(value, handle, indent=1, sort_keys=True, ensure_ascii=False)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)


def open_store(root: Path | None) -> Store:
    """A Store at `root` (default: `default_root()`); UnavailableError when a file stands in the way."""
    store = Store(root.absolute() if root else None)
    there = next(path for path in (store.root, *store.root.parents) if path.exists())
    if not there.is_dir():
        raise UnavailableError(f"{there} is a file, not a directory", hint="give another --cache DIR")
    return store
