"""Pull: the target that suits this machine, verified while it comes, into its place as a whole or not at all.

Bytes arrive in the local registry (a layout beside the artifacts), where an interrupted pull goes on, and are linked
from there into the artifact's folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from pipeline.artifact import attest, paths, swap
from pipeline.artifact.package import check_replaceable
from pipeline.artifact.place import place, sync_names, write
from pipeline.artifact.verify import examine
from pipeline.errors import VerificationError
from pipeline.frozen import frozen
from pipeline.registry import attestations, media
from pipeline.registry.crew import together
from pipeline.registry.layout import Layout, cannot_write, settle
from pipeline.registry.media import Descriptor
from pipeline.registry.pack import Unpacked
from pipeline.registry.repository import BLOCK, Advance, Repository, quiet
from pipeline.registry.stream import verified


@frozen
class Pulled:
    """An artifact in its place."""

    path: Path
    artifact_id: str
    fetched_bytes: int
    changed: bool
    """False when it was there already, whole."""


def pull(
    repository: Repository,
    target: Unpacked,
    said: Mapping[str, bytes],
    store: Layout,
    destination: Path,
    *,
    advance: Advance = quiet,
) -> Pulled:
    """Fetch what is not in `store`, and make `destination` the artifact. `said` are its attestations by file name.

    Raises VerificationError for bytes that are not the announced ones, NetworkError when they do not come, StageError
    when the disk refuses; what was at `destination` is then untouched.
    """
    check_replaceable(destination)
    if _there(destination, target):
        _add_attestations(destination, said)
        return Pulled(destination, target.artifact_id, 0, False)
    layers = {file.path: target.layers[file.path] for file in target.manifest.files}

    def bring(each: tuple[str, Descriptor], advance: Advance) -> int:
        path, layer = each
        return fetch(repository, layer, store, path, advance)

    fetched = sum(together(bring, list(layers.items()), advance, repository.workers))
    given, destination = destination, destination.resolve()
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with swap.locked(destination):
            swap.recover(destination)
            if _there(destination, target):
                _add_attestations(destination, said)
                return Pulled(given, target.artifact_id, fetched, False)
            check_replaceable(destination)
            _assemble(target, said, layers, store, destination)
    except OSError as error:
        raise cannot_write(error, destination, target.manifest.size_bytes) from error
    return Pulled(given, target.artifact_id, fetched, True)


def keep(
    repository: Repository, target: Unpacked, said: Mapping[str, bytes], store: Layout, tag: str, artifact: Path
) -> None:
    """Remember a pulled target in the local registry under a tag: manifest, configuration, attestations, files.

    A file that was collected since is linked back from the artifact, which has just been verified.
    """
    found, data = repository.manifest(target.descriptor.digest)
    config = media.descriptor(media.document(data, found.digest).get("config"), found.digest)
    own = next(
        layer
        for each in media.document(data, found.digest)["layers"]
        if (layer := media.descriptor(each, found.digest)).digest == target.artifact_id
    )
    for blob, name in ((config, "the configuration"), (own, paths.MANIFEST)):
        fetch(repository, blob, store, name)
    for path, layer in target.layers.items():
        where = store.blob_path(layer.digest)
        if not where.exists():
            with contextlib.suppress(FileExistsError):  # another pull was faster
                place(artifact / path, where, "auto")
    store.put_manifest(data, found.media_type, tag)
    attestations.attach(store, target.descriptor, said, target.artifact_id)


def fetch(repository: Repository, blob: Descriptor, store: Layout, name: str, advance: Advance = quiet) -> int:
    """Bring one blob into the layout, verified; how many bytes came. One that is there is only verified.

    An interrupted download leaves `.<hex>.partial`, and is resumed, by another process too; of two that want the same
    blob one waits.
    """
    place = store.blob_path(blob.digest)
    partial = place.with_name(f".{place.name}.partial")
    try:
        store.create()
        with _locked(partial) as stream:
            if store.has_blob(blob):
                partial.unlink()
                advance(blob.size)
                return 0
            place.unlink(missing_ok=True)
            digest, start = _resume(stream, blob)
            advance(start)
            missing = blob.size - start
            if missing > shutil.disk_usage(place.parent).free:
                raise cannot_write(OSError(28, os.strerror(28)), place, missing)
            try:
                _receive(verified(repository, blob, digest, start, name), stream, advance)
            except VerificationError:
                wrong = stream.tell()
                stream.truncate(0)
                stream.seek(0)
                advance(-wrong)
                if not start:
                    raise
                # The part from an earlier run may be what is wrong: once more, from the start.
                missing = blob.size
                _receive(verified(repository, blob, name=name), stream, advance)
            settle(stream)
            partial.replace(place)
            sync_names(place.parent)
    except VerificationError:
        partial.unlink(missing_ok=True)
        raise
    except OSError as error:
        raise cannot_write(error, place, blob.size) from error
    return missing


def _receive(blocks: Iterator[bytes], stream: BinaryIO, advance: Advance) -> None:
    for block in blocks:
        rest = memoryview(block)
        while rest:  # an unbuffered file may take less than it is given
            rest = rest[stream.write(rest) :]
        advance(len(block))


def _resume(stream: BinaryIO, blob: Descriptor) -> tuple[hashlib._Hash, int]:
    """The digest and the size of what an earlier run left; the stream stands at its end."""
    digest = hashlib.sha256()
    stream.seek(0)
    for block in iter(lambda: stream.read(BLOCK), b""):
        digest.update(block)
    if stream.tell() >= blob.size:  # never finished, or it would have been renamed
        stream.truncate(0)
        stream.seek(0)
        return hashlib.sha256(), 0
    return digest, stream.tell()


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


def _there(destination: Path, target: Unpacked) -> bool:
    """Whether this artifact is at `destination`, whole: every byte is read."""
    try:
        if (destination / paths.MANIFEST).read_bytes() != target.manifest_data or swap.left_over(destination):
            return False
    except OSError:
        return False
    return examine(destination).ok


def _assemble(
    target: Unpacked, said: Mapping[str, bytes], layers: Mapping[str, Descriptor], store: Layout, destination: Path
) -> None:
    """Put the folder together beside its destination, then swap it in."""
    with swap.replacing(destination) as new:
        for path, layer in layers.items():
            place(store.blob_path(layer.digest), new / path, "auto")
        write(target.manifest_data, new / paths.MANIFEST)
        _add_attestations(new, said)


def _add_attestations(artifact: Path, said: Mapping[str, bytes]) -> None:
    """Write those that are not there, and verdicts where there is none yet."""
    for name, data in said.items():
        path = artifact / paths.ATTESTATIONS / name
        if not path.exists() or (attestations.judged(name, data) and not attestations.judged(name, path.read_bytes())):
            attest.write_file(artifact, name, data)
