"""An OCI image layout: a folder that is a repository, for places without a network and beside the artifacts here.

`oci-layout`, `index.json` with the tags, `blobs/sha256/<hex>`. Other tools read and write it (`skopeo copy oci:...`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.artifact.place import sync_names
from pipeline.digest import canonical
from pipeline.errors import EnginewrightError, NetworkError, StageError, VerificationError
from pipeline.registry import media
from pipeline.registry.fallback import keep_tag, listed_as, referrers_tag, with_referrers
from pipeline.registry.media import Descriptor
from pipeline.registry.reference import DIGEST, Reference
from pipeline.registry.repository import BLOCK, Advance, Repository, Source, quiet

MARK = b'{"imageLayoutVersion":"1.0.0"}'
MAX_INDEX = 64 * 2**20


class Layout:
    """A repository in a folder; the folder is made by the first write."""

    workers = 1

    def __init__(self, root: Path, reference: Reference) -> None:
        self.root = root
        self.reference = reference

    def blob_path(self, digest: str) -> Path:
        """Where a blob is, or would be."""
        return self.root / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        digest = reference if DIGEST.fullmatch(reference) else self.has_manifest(reference)
        path = self.blob_path(digest)
        if not digest or not path.is_file():
            raise NetworkError(
                f"{self.reference.name}:{reference} is not there"
                if not DIGEST.fullmatch(reference)
                else f"{self.reference.name} has no manifest {reference}",
                hint=f"`enginewright ls {self.reference.name}` shows what is",
            )
        with self._open(digest) as stream:
            data = stream.read(media.MAX_MANIFEST + 1)
        found = media.described("", data)
        if found.digest != digest:
            raise VerificationError(f"{path} is not {digest}", hint="fetch it again from where it came")
        return Descriptor(media.kind_of(media.document(data, str(path))), digest, len(data)), data

    def has_manifest(self, reference: str) -> str:
        if DIGEST.fullmatch(reference):
            return reference if self.blob_path(reference).is_file() else ""
        return self.tagged().get(reference, Descriptor("", "", 0)).digest

    def put_manifest(self, data: bytes, media_type: str, tag: str = "") -> Descriptor:
        made = media.described(media_type, data)
        self.write_blob(made, lambda: contextlib.nullcontext(iter((data,))))
        if tag:
            with self._changing() as tags:
                tags[tag] = made
        return made

    def remove_tags(self, *names: str) -> None:
        """Forget tags; the bytes stay until they are collected."""
        with self._changing() as tags:
            for name in names:
                tags.pop(name, None)

    def has_blob(self, blob: Descriptor) -> bool:
        # Every byte is read: the blobs of the local registry have links in artifacts, where somebody may write.
        try:
            with self._open(blob.digest) as stream:
                about = os.fstat(stream.fileno())
                if not stat.S_ISREG(about.st_mode) or about.st_size != blob.size:
                    return False
                return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}" == blob.digest
        except (NetworkError, OSError):
            return False

    @contextlib.contextmanager
    def read_blob(self, blob: Descriptor, offset: int = 0) -> Iterator[tuple[int, Iterator[bytes]]]:
        with self._open(blob.digest) as stream:
            stream.seek(offset)
            yield offset, iter(lambda: stream.read(BLOCK), b"")

    def write_blob(self, blob: Descriptor, source: Source, advance: Advance = quiet) -> None:
        if self.has_blob(blob):
            return
        place = self.blob_path(blob.digest)
        scratch = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
        try:
            self.create()
            with scratch.open("xb") as stream, source() as blocks:
                for block in blocks:
                    stream.write(block)
                    advance(len(block))
                settle(stream)
            scratch.replace(place)
            sync_names(place.parent)
        except OSError as error:
            raise cannot_write(error, place, blob.size) from error
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink()

    def mount(self, blob: Descriptor, origin: Repository) -> bool:
        return False

    def tags(self) -> list[str]:
        return sorted(self.tagged())

    def referrers(self, digest: str) -> list[Descriptor]:
        tag = referrers_tag(digest)
        if not self.has_manifest(tag):
            return []
        value = media.document(self.manifest(tag)[1], f"{self.reference.name}:{tag}")
        return [media.descriptor(each, f"{self.reference.name}:{tag}") for each in value.get("manifests", ())]

    def attach(self, manifests: Sequence[bytes], subject: str) -> None:
        entries = [listed_as(data) for data in manifests]
        for data, entry in zip(manifests, entries, strict=True):
            self.put_manifest(data, media.MANIFEST, keep_tag(subject, entry.digest))
        tag = referrers_tag(subject)
        before = self.manifest(tag)[1] if self.has_manifest(tag) else b""
        after = with_referrers(before, entries, subject)
        if after != before:
            self.put_manifest(after, media.INDEX, tag)

    def tagged(self) -> dict[str, Descriptor]:
        """Tag -> what it stands for. A layout of one manifest without a name has it as `latest`."""
        value = self._index()
        found, nameless = dict[str, Descriptor](), list[Descriptor]()
        for each in value.get("manifests", ()):
            entry = media.descriptor(each, str(self.root / "index.json"))
            if name := entry.annotations.get(media.REF_NAME):
                found[name] = entry
            else:
                nameless.append(entry)
        if not found and len(nameless) == 1:
            found["latest"] = nameless[0]
        return found

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Keep blobs that have no tag yet from being collected while the block runs."""
        try:
            self.create()
            handle = (self.root / ".using").open("w")
        except OSError as error:
            raise cannot_write(error, self.root, 0) from error
        with handle:
            fcntl.flock(handle, fcntl.LOCK_SH)
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether nobody is `using` it; if so, nobody begins while the block runs."""
        with (self.root / ".using").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def create(self) -> None:
        """Make the folder a layout, if it is none. StageError when something else is there."""
        mark = self.root / "oci-layout"
        if mark.exists():
            return
        if self.root.exists() and any(self.root.iterdir()) and not (self.root / "blobs").is_dir():
            raise StageError(f"{self.root} is not empty and is no OCI layout", hint="choose another folder")
        self.blob_path("").mkdir(parents=True, exist_ok=True)
        _write(self.root / "index.json", _index_bytes({}))
        _write(mark, MARK)

    def _index(self) -> dict[str, Any]:
        path = self.root / "index.json"
        try:
            with path.open("rb") as stream:
                data = stream.read(MAX_INDEX + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise NetworkError(
                f"{path} cannot be read: {error.strerror}", hint="give the folder of a layout"
            ) from error
        return media.document(data, str(path))

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, Descriptor]]:
        """The tags, for changing: written back whole when the block ends well, by one process at a time."""
        try:
            self.create()
            with (self.root / ".lock").open("w") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX)
                tags = self.tagged()
                yield tags
                _write(self.root / "index.json", _index_bytes(tags))
        except OSError as error:
            raise cannot_write(error, self.root / "index.json", 0) from error

    def _open(self, digest: str) -> io.FileIO:
        """A blob; a link that was put in its place is refused."""
        path = self.blob_path(digest)
        try:
            return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0)
        except OSError as error:
            raise NetworkError(
                f"{path} cannot be read: {error.strerror}", hint=f"is {self.root} a whole OCI layout?"
            ) from error


def settle(stream: BinaryIO) -> None:
    """Put a finished file on disk, read-only."""
    stream.flush()
    os.fchmod(stream.fileno(), 0o444)
    os.fsync(stream.fileno())


def cannot_write(error: OSError, place: Path, need: int) -> EnginewrightError:
    """The error for a place that takes no bytes."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StageError(
            f"no space left for {place}: {need:,} bytes needed",
            hint="free some space (`enginewright gc`), or give another place with --out; what has arrived is kept",
        )
    return StageError(
        f"{error.filename or place} cannot be written: {error.strerror}", hint="choose a place that you may write to"
    )


def _index_bytes(tags: dict[str, Descriptor]) -> bytes:
    entries = []
    for name, entry in sorted(tags.items()):
        annotations = {**entry.annotations, media.REF_NAME: name}
        entries.append({**entry.bare.plain(), "annotations": annotations})
    return canonical({"schemaVersion": 2, "mediaType": media.INDEX, "manifests": entries})


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with scratch.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
