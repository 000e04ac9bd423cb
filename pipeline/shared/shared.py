"""The store behind the store: what another builder made is fetched and checked, what this one makes is offered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.digest import sha256_file
from pipeline.errors import NetworkError, VerificationError
from pipeline.registry.crew import together
from pipeline.shared.denied import DeniedError
from pipeline.shared.place import Place
from pipeline.shared.record import File, Record
from pipeline.store import Entry, Store

WORKERS = 4
LOOKUPS = 16

Tell = Callable[[str], None]
"""Told what a person should know, once each."""


class Shared:
    """A place, as one build sees it. One that fails is left alone for the rest of the build: no build fails of it."""

    def __init__(self, place: Place, url: str, *, read_only: bool = False) -> None:
        self.place, self.url = place, url
        self.read_only = read_only
        self.broken = ""
        """Why the place is not asked any more."""
        self._there: dict[str, Record | None] = {}
        self._damaged: set[str] = set()
        """Blobs with other bytes than their name says."""
        self._refused: set[str] = set()
        """Keys whose record, or what it names, was not what it should be: to be written anew."""
        self._lock = threading.Lock()

    def look_up(self, keys: Iterable[str], tell: Tell) -> dict[str, Record]:
        """The records of those keys that are there, asked for side by side."""
        wanted = [key for key in keys if key not in self._there]
        with ThreadPoolExecutor(LOOKUPS) as pool:
            for key, found in zip(wanted, pool.map(lambda key: self._record(key, tell), wanted), strict=True):
                self._there[key] = found
        return {key: record for key, record in self._there.items() if record}

    def fetch(self, key: str, store: Store, tell: Tell) -> Entry | None:
        """A result, brought into the local store, every file checked; None where it is not there, or not what it should
        be. The caller holds the store's lock of the key."""
        if key not in self._there or self._there[key] is None:  # another builder may have made it since
            self._there[key] = self._record(key, tell)
        record = self._there[key]
        if record is None:
            return None
        try:
            with store.adding(key, dict(record.key_text), dict(record.run)) as out:
                self._files(record, out)
        except VerificationError as error:
            self._refuse(key, error, tell)
            return None
        except NetworkError as error:
            self._leave(error, tell)
            return None
        return store.get(key)

    def offer(self, entry: Entry, store: Store, tell: Tell) -> Entry:
        """Put a result where others find it, unless it is there. The entry that holds from now on: where another
        builder was first with other bytes for the same key, its result, so that all go on with one. The caller holds
        the store's lock of the key."""
        if self.broken or (self._there.get(entry.key) and entry.key not in self._refused):
            return entry
        if not self.read_only:
            record = Record.of(entry, store.key_text(entry.key) or {})
            blobs = {file.digest: (file, entry.out / file.path) for file in record.files}
            try:
                self.place.put(
                    entry.key,
                    record.data(),
                    list(blobs.values()),
                    damaged=frozenset(self._damaged),
                    replace=entry.key in self._refused,
                )
            except DeniedError as error:
                self.read_only = True
                tell(f"the shared store may only be read from here ({error.message}): results stay on this machine")
            except (NetworkError, VerificationError) as error:
                self._leave(error, tell)
        if self.broken:
            return entry
        self._refused.discard(entry.key)
        found = self._there[entry.key] = self._record(entry.key, tell)
        if found and found.files != Record.of(entry, {}).files:
            tell(f"{entry.key}: another builder was first, with other bytes: its result is taken")
            return self.fetch(entry.key, store, tell) or entry
        return entry

    def _record(self, key: str, tell: Tell) -> Record | None:
        if self.broken or key in self._refused:
            return None
        try:
            data = self.place.record(key)
            return None if data is None else Record.read(key, data)
        except VerificationError as error:
            self._refuse(key, error, tell)
        except NetworkError as error:
            self._leave(error, tell)
        return None

    def _files(self, record: Record, out: Path) -> None:
        """Every file of a result, each with the digest that the record says."""

        def fetch(file: File, _: object) -> None:
            path = out / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self.place.fetch(file, path):
                raise VerificationError(f"the bytes of {file.path} are not there")
            if path.stat().st_size != file.size or sha256_file(path) != file.digest:
                self._damaged.add(file.digest)
                raise VerificationError(f"{file.path} is not what its digest says")

        together(fetch, record.files, lambda size: None, WORKERS)

    def _refuse(self, key: str, error: VerificationError, tell: Tell) -> None:
        self._there[key] = None
        self._refused.add(key)
        tell(f"{key} in the shared store is corrupt ({error.message}): not used")

    def _leave(self, error: Exception, tell: Tell) -> None:
        with self._lock:
            first, self.broken = not self.broken, self.broken or str(error)
        if first:
            tell(f"the shared store cannot be used ({error}): the build goes on without it")
