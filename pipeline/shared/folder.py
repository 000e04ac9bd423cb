"""A folder that several machines see: `file:///mnt/team/enginewright`."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import NetworkError
from pipeline.shared.denied import DeniedError
from pipeline.shared.layout import blob_name, record_name
from pipeline.shared.record import MAX_BYTES, File


class Folder:
    """Every file is written under another name and moved, so that nobody sees a part of one."""

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, root.as_uri()

    def record(self, key: str) -> bytes | None:
        with self._explained():
            try:
                with (self.root / record_name(key)).open("rb") as stream:
                    return stream.read(MAX_BYTES)
            except FileNotFoundError:
                if not self.root.is_dir():
                    raise
                return None
        return None

    def fetch(self, blob: File, path: Path) -> bool:
        with self._explained():
            try:
                with (self.root / blob_name(blob.digest)).open("rb") as source, path.open("xb") as copy:
                    if os.fstat(source.fileno()).st_size != blob.size:
                        return True  # cut off, or something else: the reader sees that it is not what was announced
                    shutil.copyfileobj(source, copy, 1 << 20)
            except FileNotFoundError:
                return False
        return True

    def put(
        self, key: str, record: bytes, blobs: Sequence[tuple[File, Path]], *, damaged: frozenset[str], replace: bool
    ) -> None:
        with self._explained():
            for blob, path in blobs:
                there = self.root / blob_name(blob.digest)
                whole = there.is_file() and there.stat().st_size == blob.size and blob.digest not in damaged
                if not whole:
                    with self._new(there) as new:
                        shutil.copyfile(path, new)
                        new.replace(there)
            final = self.root / record_name(key)
            with self._new(final) as new:
                new.write_bytes(record)
                if replace:
                    new.replace(final)
                else:
                    with contextlib.suppress(FileExistsError):
                        os.link(new, final)

    @contextlib.contextmanager
    def _new(self, final: Path) -> Iterator[Path]:
        """A name beside `final` that nobody else has; what is left under it goes."""
        final.parent.mkdir(parents=True, exist_ok=True)
        new = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")
        try:
            yield new
        finally:
            new.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            raise DeniedError(f"{self.name}: {error.strerror} ({error.filename})") from error
        except OSError as error:
            raise NetworkError(f"{self.name}: {error.strerror} ({error.filename})") from error
