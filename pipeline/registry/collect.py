"""Collect garbage in a layout: blobs that no tag leads to, and what killed pulls left."""

from __future__ import annotations

from pipeline.errors import NetworkError, VerificationError
from pipeline.frozen import frozen
from pipeline.registry.fallback import is_internal
from pipeline.registry.layout import Layout
from pipeline.registry.transfer import blobs, children


@frozen
class Collected:
    """What was removed."""

    files: int
    size_bytes: int
    in_use: bool = False
    """A pull uses the layout now; nothing was removed."""


def collect(layout: Layout) -> Collected:
    """Remove what no tag of a version leads to. Attestations live as long as what they speak of."""
    with layout.alone() as held:
        if not held:
            return Collected(0, 0, in_use=True)
        tags = layout.tagged()
        live: set[str] = set()
        for tag, entry in tags.items():
            if not is_internal(tag):
                _mark(layout, entry.digest, live)
        dead = [tag for tag in tags if is_internal(tag) and _subject(tag) not in live]
        for tag, entry in tags.items():
            if is_internal(tag) and tag not in dead:
                _mark(layout, entry.digest, live)
        if dead:
            layout.remove_tags(*dead)
        return _sweep(layout, live)


def _subject(tag: str) -> str:
    return tag.partition(".")[0].replace("-", ":", 1)


def _mark(layout: Layout, digest: str, live: set[str]) -> None:
    """A manifest and everything that it leads to. What is damaged or missing leads nowhere."""
    if digest in live:
        return
    live.add(digest)
    try:
        found, data = layout.manifest(digest)
        parts = blobs(found, data)
        below = children(found, data)
    except (NetworkError, VerificationError):
        return
    live.update(blob.digest for blob in parts)
    for each in below:
        _mark(layout, each.digest, live)


def _sweep(layout: Layout, live: set[str]) -> Collected:
    files = size_bytes = 0
    folder = layout.blob_path("")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if f"sha256:{path.name}" in live:
            continue
        files += 1
        found = path.lstat()
        size_bytes += found.st_size if found.st_nlink == 1 else 0  # an artifact holds the others' bytes
        path.unlink(missing_ok=True)
    return Collected(files, size_bytes)
