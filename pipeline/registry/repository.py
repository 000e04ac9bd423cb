"""Repository: what a registry, a layout folder and a tar file have in common. Every transfer is written against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from pipeline.registry.media import Descriptor
from pipeline.registry.reference import Reference

Advance = Callable[[int], None]
"""Told the bytes as they come, negative when some were in vain."""
Source = Callable[[], AbstractContextManager[Iterator[bytes]]]
"""Opens the bytes of a blob from their start; may be called again when an attempt failed."""
BLOCK = 1 << 18
"""Bytes that are held at a time; what a broken line loses of what had arrived."""


def quiet(size: int) -> None:
    """An Advance for callers who do not watch."""


class Repository(Protocol):
    """Manifests by tag and digest, blobs by digest. Digests are checked by whoever reads."""

    reference: Reference
    workers: int
    """How many transfers it takes at once."""

    def manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        """A manifest by tag or digest, its digest computed from its bytes.

        NetworkError when there is none, VerificationError when the bytes are not those that a digest names.
        """
        ...

    def has_manifest(self, reference: str) -> str:
        """The digest of what a tag or digest stands for; empty if there is none."""
        ...

    def put_manifest(self, data: bytes, media_type: str, tag: str = "") -> Descriptor:
        """Store a manifest whose parts are there, under a tag if one is given."""
        ...

    def has_blob(self, blob: Descriptor) -> bool:
        """Whether a blob of that digest and size is there."""
        ...

    def read_blob(self, blob: Descriptor, offset: int = 0) -> AbstractContextManager[tuple[int, Iterator[bytes]]]:
        """Where the bytes begin (0 when an offset cannot be had) and the bytes, unchecked."""
        ...

    def write_blob(self, blob: Descriptor, source: Source, advance: Advance = quiet) -> None:
        """Store a blob; its bytes are checked on the way."""
        ...

    def mount(self, blob: Descriptor, origin: Repository) -> bool:
        """Take a blob from a repository of the same place without moving bytes; False where that cannot be."""
        ...

    def tags(self) -> list[str]:
        """Every tag, sorted."""
        ...

    def referrers(self, digest: str) -> list[Descriptor]:
        """The manifests whose subject is `digest`."""
        ...

    def attach(self, manifests: Sequence[bytes], subject: str) -> None:
        """Store manifests that have a subject, so that `referrers` finds them and no collector deletes them."""
        ...
