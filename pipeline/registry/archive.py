"""An OCI image layout in one tar file: read in place by offsets, never unpacked; written anew as a whole.

Only `oci-layout`, `index.json` and `blobs/sha256/<hex>` of a file that came from outside are looked at, and only where
they are regular files. What is written is deterministic: no times, no owners.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import NetworkError, VerificationError
from pipeline.registry import media
from pipeline.registry.layout import MARK, MAX_INDEX, Layout, _index_bytes, cannot_write
from pipeline.registry.media import Descriptor
from pipeline.registry.reference import Reference
from pipeline.registry.repository import BLOCK, Advance, Source, quiet

_NAME = re.compile(r"(?:\./)?(oci-layout|index\.json|blobs/sha256/[0-9a-f]{64})")
MAX_MEMBERS = 100_000


class ArchiveReader(Layout):
    """A repository in a tar file, read only."""

    def __init__(self, path: Path, reference: Reference) -> None:
        super().__init__(path, reference)
        self.members = _members(path)

    def has_manifest(self, reference: str) -> str:
        if reference.startswith("sha256:"):
            return reference if self._name(reference) in self.members else ""
        return super().has_manifest(reference)

    def manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        digest = self.has_manifest(reference)
        if not digest:
            raise NetworkError(
                f"{self.reference.name} has no {reference}",
                hint=f"`enginewright ls {self.reference.name}` shows what is",
            )
        data = self._read(self._name(digest), media.MAX_MANIFEST)
        if media.described("", data).digest != digest:
            raise VerificationError(f"{self.root}: {self._name(digest)} has other contents", hint="fetch it again")
        return Descriptor(media.kind_of(media.document(data, str(self.root))), digest, len(data)), data

    def has_blob(self, blob: Descriptor) -> bool:
        return self.members.get(self._name(blob.digest), (0, -1))[1] == blob.size

    @contextlib.contextmanager
    def read_blob(self, blob: Descriptor, offset: int = 0) -> Iterator[tuple[int, Iterator[bytes]]]:
        if (name := self._name(blob.digest)) not in self.members:
            raise NetworkError(f"{self.root} has no {name}", hint="it is not whole: fetch it again")
        start, size = self.members[name]
        with self.root.open("rb", buffering=0) as stream:
            stream.seek(start + offset)
            yield offset, _blocks(stream, size - offset)

    def write_blob(self, blob: Descriptor, source: Source, advance: Advance = quiet) -> None:
        raise NotImplementedError("a tar file is written as a whole")

    def _index(self) -> dict[str, object]:
        if "index.json" not in self.members:
            raise VerificationError(f"{self.root} holds no OCI layout", hint="give a file that `copy` wrote")
        return media.document(self._read("index.json", MAX_INDEX), f"index.json of {self.root}")

    def _read(self, name: str, limit: int) -> bytes:
        start, size = self.members[name]
        if size > limit:
            raise VerificationError(f"{self.root}: {name} has {size} bytes, and {limit} are allowed")
        with self.root.open("rb") as stream:
            stream.seek(start)
            return stream.read(size)

    @staticmethod
    def _name(digest: str) -> str:
        return f"blobs/sha256/{digest.removeprefix('sha256:')}"


class ArchiveWriter(Layout):
    """A repository that becomes a tar file when it is finished."""

    def __init__(self, path: Path, reference: Reference) -> None:
        super().__init__(path, reference)
        self.scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        self.written: dict[str, int] = {}
        self.manifests: dict[str, bytes] = {}
        self.names: dict[str, Descriptor] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.stream = self.scratch.open("xb", buffering=0)
            self._header("oci-layout", len(MARK))
            self._body(MARK)
            self._pad(len(MARK))
        except OSError as error:
            self.scratch.unlink(missing_ok=True)
            raise cannot_write(error, path, 0) from error

    def has_manifest(self, reference: str) -> str:
        if reference.startswith("sha256:"):
            return reference if reference in self.manifests else ""
        return self.names[reference].digest if reference in self.names else ""

    def manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        data = self.manifests[self.has_manifest(reference)]
        return media.described(media.kind_of(media.document(data, reference)), data), data

    def put_manifest(self, data: bytes, media_type: str, tag: str = "") -> Descriptor:
        made = media.described(media_type, data)
        self.write_blob(made, lambda: contextlib.nullcontext(iter((data,))))
        self.manifests[made.digest] = data
        if tag:
            self.names[tag] = made
        return made

    def has_blob(self, blob: Descriptor) -> bool:
        return blob.digest in self.written

    def write_blob(self, blob: Descriptor, source: Source, advance: Advance = quiet) -> None:
        if blob.digest in self.written:
            return
        start = self.stream.tell()
        try:
            self._header(f"blobs/sha256/{blob.digest.removeprefix('sha256:')}", blob.size)
            with source() as blocks:
                for block in blocks:
                    self._body(block)
                    advance(len(block))
            self._pad(blob.size)
        except BaseException as error:
            self.stream.seek(start)
            self.stream.truncate()
            if isinstance(error, OSError):
                raise cannot_write(error, self.root, blob.size) from error
            raise
        self.written[blob.digest] = blob.size

    def tags(self) -> list[str]:
        return sorted(self.names)

    def tagged(self) -> dict[str, Descriptor]:
        return dict(self.names)

    def finish(self) -> None:
        """Put the file in its place."""
        data = _index_bytes(self.names)
        try:
            self._header("index.json", len(data))
            self._body(data)
            self._pad(len(data))
            self._body(bytes(2 * tarfile.BLOCKSIZE))
            os.fsync(self.stream.fileno())
            self.stream.close()
            self.scratch.replace(self.root)
        except OSError as error:
            raise cannot_write(error, self.root, len(data)) from error

    def discard(self) -> None:
        """Leave nothing behind."""
        self.stream.close()
        self.scratch.unlink(missing_ok=True)

    def _header(self, name: str, size: int) -> None:
        about = tarfile.TarInfo(name)
        about.size = size
        self._body(about.tobuf(tarfile.PAX_FORMAT))

    def _body(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:  # an unbuffered file may take less than it is given
            rest = rest[self.stream.write(rest) :]

    def _pad(self, size: int) -> None:
        self._body(bytes(-size % tarfile.BLOCKSIZE))


def _members(path: Path) -> dict[str, tuple[int, int]]:
    """Name -> (offset, size) of what a layout is made of."""
    found: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for count, member in enumerate(tar):
                known = _NAME.fullmatch(member.name)
                if count >= MAX_MEMBERS:
                    raise VerificationError(f"{path} has more than {MAX_MEMBERS} members")
                if not known:
                    continue
                if not member.isreg() or member.issparse():
                    raise VerificationError(f"{path}: {known[1]} is not a regular file", hint="do not use it")
                if known[1] in found:
                    raise VerificationError(f"{path}: {known[1]} stands twice", hint="do not use it")
                found[known[1]] = (member.offset_data, member.size)
    except FileNotFoundError:
        raise NetworkError(f"{path} is not there", hint="check its name") from None
    except OSError as error:
        raise NetworkError(f"{path} cannot be read: {error.strerror}") from error
    except tarfile.TarError as error:
        raise VerificationError(
            f"{path} is not a plain tar file: {error}", hint="unpack it if it is compressed"
        ) from None
    return found


def _blocks(stream: io.RawIOBase, size: int) -> Iterator[bytes]:
    while size > 0 and (block := stream.read(min(BLOCK, size))):
        size -= len(block)
        yield block
