"""Download a file of a commit: resumed after a kill, verified, by one process at a time.

The loop is ours because the library's starts a file again after a kill and verifies nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import NetworkError, VerificationError, disk_full
from pipeline.hub.client import endpoint, library, timeout_s
from pipeline.hub.explain import RESUMES, wait_or_raise
from pipeline.hub.listing import RemoteFile


def download(
    repo: str, commit: str, file: RemoteFile, place: Path, advance: Callable[[int], None] = lambda size: None
) -> str:
    """Bring one file to `place`, verified, and return its `sha256:<hex>`. A file that is there is only verified.

    An interrupted download leaves `<place>.partial` and is resumed, by another process too; of two that want the same
    file one waits. `advance` is told the bytes as they come, negative when some were in vain. Raises VerificationError
    (not the announced bytes), StageError (disk full) or NetworkError.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(place.name + ".partial")
    with _locked(partial) as stream:
        sums = _Sums(file)
        if place.exists():
            with place.open("rb") as there:
                sums.read(there)
            if sums.announced():
                partial.unlink()
                advance(file.size)
                return "sha256:" + sums.sha256.hexdigest()
            place.unlink()  # damaged since
            sums.reset()
        sums.read(stream)
        resumed = stream.tell() > 0
        advance(stream.tell())
        if file.size - stream.tell() > shutil.disk_usage(place.parent).free:
            raise disk_full(place, file.size - stream.tell())
        try:
            _receive(repo, commit, file, stream, sums, advance)
            if resumed and not sums.announced():
                # The part from an earlier run may be what is wrong: once more, from the start.
                _restart(stream, sums, advance)
                _receive(repo, commit, file, stream, sums, advance)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk_full(place, file.size - stream.tell()) from error
            raise
        if not sums.announced():
            partial.unlink()
            raise VerificationError(
                f"{file.path} of hf://{repo} at {commit[:12]} is not what the hub announced: "
                f"expected {sums.expected()}, got {sums.got()} ({stream.tell()} bytes); it was deleted",
                hint="run the command again; if it stays, a proxy or HF_ENDPOINT alters the file",
            )
        partial.replace(place)
        return "sha256:" + sums.sha256.hexdigest()


class _Sums:
    """The digests of a file as its bytes come."""

    def __init__(self, file: RemoteFile) -> None:
        self.file = file
        self.reset()

    def reset(self) -> None:
        self.sha256 = hashlib.sha256()
        self.blob = hashlib.sha1(b"blob %d\0" % self.file.size, usedforsecurity=False)

    def add(self, block: bytes) -> None:
        self.sha256.update(block)
        if self.file.sha256 is None:
            self.blob.update(block)

    def read(self, stream: BinaryIO) -> None:
        for block in iter(lambda: stream.read(1 << 20), b""):
            self.add(block)

    def expected(self) -> str:
        return f"sha256:{self.file.sha256}" if self.file.sha256 else f"git blob {self.file.blob}"

    def got(self) -> str:
        return f"sha256:{self.sha256.hexdigest()}" if self.file.sha256 else f"git blob {self.blob.hexdigest()}"

    def announced(self) -> bool:
        return self.expected() == self.got()


def _receive(
    repo: str, commit: str, file: RemoteFile, stream: BinaryIO, sums: _Sums, advance: Callable[[int], None]
) -> None:
    """Append to `stream` until it has the file's size, with a bounded number of attempts that bring nothing."""
    utils = library("utils")
    url = library().hf_hub_url(repo, file.path, revision=commit, endpoint=endpoint())
    failures, best = 0, stream.tell()
    while stream.tell() < file.size:
        # Identity: a compressed answer could not be resumed at a byte of the file.
        headers = {**utils.build_hf_headers(library_name="enginewright"), "Accept-Encoding": "identity"}
        if stream.tell():
            headers["Range"] = f"bytes={stream.tell()}-"
        try:
            with utils.get_session().stream("GET", url, headers=headers, timeout=timeout_s()) as response:
                if stream.tell() and response.status_code in (200, 416):  # it knows no ranges, or its file is shorter
                    _restart(stream, sums, advance)
                utils.hf_raise_for_status(response)
                for block in response.iter_bytes():
                    _append(stream, block)
                    sums.add(block)
                    advance(len(block))
                    if stream.tell() > file.size:
                        return
            if stream.tell() < file.size:
                got = f"{stream.tell():,} of {file.size:,} bytes"
                raise NetworkError(f"{file.path} of hf://{repo} ended after {got}", hint=RESUMES)
        except Exception as error:
            # A server that never gets further than before must not be asked for ever.
            failures, best = (1, stream.tell()) if stream.tell() > best else (failures + 1, best)
            wait_or_raise(error, failures, repo, commit, file.path)


def _append(stream: BinaryIO, block: bytes) -> None:
    """Write all of a block: an unbuffered file may take less than it is given."""
    rest = memoryview(block)
    while rest:
        rest = rest[stream.write(rest) :]


def _restart(stream: BinaryIO, sums: _Sums, advance: Callable[[int], None]) -> None:
    advance(-stream.tell())
    stream.seek(0)
    stream.truncate()
    sums.reset()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file, opened for reading and writing, held by this process alone. Unbuffered: a kill loses nothing."""
    while True:
        stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b", buffering=0)
        with stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            try:
                current = os.path.samestat(os.fstat(stream.fileno()), path.stat())
            except FileNotFoundError:
                current = False
            if current:
                yield stream
                return
        # Whoever held it has renamed or removed it since we opened it.
