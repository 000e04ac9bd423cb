"""The bytes of a blob, checked as they come: resumed when the line breaks, and never more than were announced."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import NetworkError, StageError, VerificationError
from pipeline.registry.client import AGAIN, ATTEMPTS, TRANSIENT, MisledError, Refused, pause
from pipeline.registry.media import Descriptor
from pipeline.registry.repository import BLOCK, Repository, Source

GAP_S = 600.0
"""How long a download may go without a byte of progress, all attempts together."""


def verified(
    repository: Repository, blob: Descriptor, known: Any = None, offset: int = 0, name: str = ""
) -> Iterator[bytes]:
    """The bytes of a blob from `offset` on; the last of them only when the whole has its digest.

    `known` is a sha256 object that has seen the bytes before `offset`. VerificationError for bytes that the digest does
    not name, NetworkError when they do not come.
    """
    digest = known or hashlib.sha256()
    held: bytes = b""
    done, failures, since = offset, 0, time.monotonic()
    ended_at: set[int] = set()
    what = f"{name or blob.digest} of {repository.reference.name}"
    while done < blob.size:
        before = done
        try:
            with repository.read_blob(blob, done) as (start, blocks):
                skip = done - start
                for block in blocks:
                    fresh, skip = block[skip:], max(0, skip - len(block))
                    if done + len(fresh) > blob.size:
                        raise VerificationError(
                            f"{what} has more than the {blob.size} bytes that were announced", hint=HINT
                        )
                    if fresh:
                        digest.update(fresh)
                        done += len(fresh)
                        if held:
                            yield held
                        held = fresh
            if done < blob.size:
                told = f"{what} ended after {done:,} of {blob.size:,} bytes"
                if done in ended_at:  # a whole answer, twice: the blob is cut off, not the line
                    raise VerificationError(told, hint=HINT)
                ended_at.add(done)
                raise NetworkError(told, hint=AGAIN)
        except NetworkError as error:
            cause = error.__cause__
            status = cause.status if isinstance(cause, Refused) else 0
            if done > before:
                failures, since = 0, time.monotonic()
            failures += 1
            if held and done < blob.size:  # not the last of it: a later attempt goes on behind it
                yield held
                held = b""
            gone = failures >= ATTEMPTS or time.monotonic() - since > GAP_S
            if gone or isinstance(error, MisledError) or (status and status not in TRANSIENT):
                raise
            pause(failures, cause.retry_after if isinstance(cause, Refused) else "")
    if (got := f"sha256:{digest.hexdigest()}") != blob.digest:
        raise VerificationError(f"{what} has other contents: {got}, and {blob.digest} was announced", hint=HINT)
    if held:
        yield held


HINT = "do not use what is there: the registry's storage is damaged, or something in between alters what it sends"


def of_file(path: Path, blob: Descriptor) -> Source:
    """A Source over a file. It ends in VerificationError, before its last block, if the file is not the one listed."""

    @contextlib.contextmanager
    def opened() -> Iterator[Iterator[bytes]]:
        try:
            stream = path.open("rb", buffering=0)
        except OSError as error:
            raise StageError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error
        with stream:
            yield blocks(stream)

    def blocks(stream: Any) -> Iterator[bytes]:
        digest, done, held = hashlib.sha256(), 0, b""
        while True:
            try:
                block: bytes = stream.read(BLOCK)
            except OSError as error:
                raise StageError(f"{path} cannot be read: {error.strerror}", hint="check the disk") from error
            if not block:
                break
            digest.update(block)
            done += len(block)
            if held:
                yield held
            held = block
        if done != blob.size or f"sha256:{digest.hexdigest()}" != blob.digest:
            raise VerificationError(
                f"{path} is not what its manifest says", hint="do not use it: build it again; nothing was published"
            )
        if held:
            yield held

    return opened


def of_bytes(data: bytes) -> Source:
    """A Source over bytes."""
    return lambda: contextlib.nullcontext(iter((data,) if data else ()))


def of_repository(repository: Repository, blob: Descriptor) -> Source:
    """A Source over a blob elsewhere."""
    return lambda: contextlib.nullcontext(verified(repository, blob))


def small(repository: Repository, blob: Descriptor, limit: int, name: str = "") -> bytes:
    """A whole blob in memory. VerificationError when it is announced larger than `limit` bytes."""
    if blob.size > limit:
        raise VerificationError(
            f"{name or blob.digest} of {repository.reference.name} has {blob.size} bytes, and {limit} are allowed"
        )
    return b"".join(verified(repository, blob, name=name))
