"""Place: what a folder, a bucket and a registry have in common, as far as a shared store needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from pipeline.shared.record import File

Blob = Callable[[File], Path]
"""Where on this machine the bytes of a file are."""


class Place(Protocol):
    """Records by key, and the blobs that they name by digest.

    Whoever reads checks: a place may hold anything. Errors of the place itself are NetworkError; DeniedError is the one
    for what the caller may not do.
    """

    name: str
    """What a person calls it: its URL, without credentials."""

    def record(self, key: str) -> bytes | None:
        """The record of a key, at most `record.MAX_BYTES` of it; None if there is none."""
        ...

    def fetch(self, blob: File, path: Path) -> bool:
        """Write a blob's bytes, unchecked, to a new file; at most `blob.size` of them. False if it is not there."""
        ...

    def put(
        self, key: str, record: bytes, blobs: Sequence[tuple[File, Path]], *, damaged: frozenset[str], replace: bool
    ) -> None:
        """Store what is missing of the blobs, each whole or not at all, and at last the record.

        Blobs whose digests are `damaged` are written again though they are there. A record that is there stays, unless
        `replace`: of two writers the first wins, where the place can tell.
        """
        ...
