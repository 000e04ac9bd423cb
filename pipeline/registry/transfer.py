"""Copy a version from one repository to another: children, blobs, referrers and tags, every digest unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.errors import VerificationError
from pipeline.registry import media
from pipeline.registry.fallback import is_internal
from pipeline.registry.media import Descriptor
from pipeline.registry.repository import Advance, Repository, quiet
from pipeline.registry.stream import of_repository

MAX_DEPTH = 3
MAX_CHILDREN = 256


@dataclass
class Sent:
    """What a transfer moved."""

    blobs: int = 0
    size_bytes: int = 0
    mounted: int = 0
    present: int = 0
    manifests: int = 0


@dataclass
class Copier:
    """One copy from `source` to `destination`."""

    source: Repository
    destination: Repository
    advance: Advance = quiet
    sent: Sent = field(default_factory=Sent)
    _done: set[str] = field(default_factory=set)

    def version(self, reference: str, tags: Sequence[str]) -> Descriptor:
        """Copy what `reference` stands for; then put it under `tags`, and its children under `<tag>-<target>`.

        The tags come last: whatever breaks off before them is invisible.
        """
        found, data = self.source.manifest(reference)
        self._manifest(found, data, 0)
        for tag in tags:
            for each in children(found, data):
                if target := each.annotations.get(media.TARGET):
                    self._tag(each.digest, child_tag(tag, target))
            self._tag(found.digest, tag)
        return found

    def blob(self, blob: Descriptor) -> None:
        """Copy a blob that is not there yet; mounted where the registry can."""
        if blob.digest in self._done:
            return
        self._done.add(blob.digest)
        if self.destination.has_blob(blob):
            self.sent.present += 1
            self.advance(blob.size)
        elif self.destination.mount(blob, self.source):
            self.sent.mounted += 1
            self.advance(blob.size)
        else:
            self.destination.write_blob(blob, of_repository(self.source, blob), self.advance)
            self.sent.blobs += 1
            self.sent.size_bytes += blob.size

    def _manifest(self, found: Descriptor, data: bytes, depth: int) -> None:
        """What a manifest points to, the manifest, and what refers to it."""
        if found.digest in self._done:
            return
        self._done.add(found.digest)
        if depth >= MAX_DEPTH:
            raise VerificationError(f"{self.source.reference.name}: {found.digest} is nested too deeply")
        for each in children(found, data):
            child, text = self.source.manifest(each.digest)
            self._manifest(child, text, depth + 1)
        for blob in blobs(found, data):
            self.blob(blob)
        self._put(found, data)
        self._referrers(found.digest, depth)

    def _put(self, found: Descriptor, data: bytes) -> None:
        if not self.destination.has_manifest(found.digest):
            self.destination.put_manifest(data, found.media_type)
            self.sent.manifests += 1

    def _referrers(self, subject: str, depth: int) -> None:
        """Everything that refers to a manifest, and what refers to that."""
        present = {each.digest for each in self.destination.referrers(subject)}
        new = []
        for entry in self.source.referrers(subject):
            found, data = self.source.manifest(entry.digest)
            told = media.document(data, entry.digest).get("subject")
            if not isinstance(told, dict) or told.get("digest") != subject:
                raise VerificationError(
                    f"{self.source.reference.name}: {entry.digest} is listed as speaking of {subject}, and does not",
                    hint="the list of referrers was altered: remove it, or sign again",
                )
            for blob in blobs(found, data):
                self.blob(blob)
            if found.digest not in present:
                new.append((found.digest, data))
        if new:
            self.destination.attach([data for _, data in new], subject)
            self.sent.manifests += len(new)
        for digest, _ in new if depth < MAX_DEPTH else ():
            self._referrers(digest, depth + 1)

    def _tag(self, digest: str, tag: str) -> None:
        if self.destination.has_manifest(tag) != digest:
            found, data = self.source.manifest(digest)
            self.destination.put_manifest(data, found.media_type, tag)
            self.sent.manifests += 1


def children(found: Descriptor, data: bytes) -> list[Descriptor]:
    """The manifests that an index lists; none for a manifest."""
    if not media.is_index(found.media_type):
        return []
    value = media.document(data, found.digest)
    listed = [media.descriptor(each, found.digest) for each in value.get("manifests", ())]
    if len(listed) > MAX_CHILDREN:
        raise VerificationError(f"{found.digest} lists {len(listed)} manifests, and {MAX_CHILDREN} are allowed")
    return listed


def blobs(found: Descriptor, data: bytes) -> list[Descriptor]:
    """The blobs that a manifest names, its configuration first."""
    if media.is_index(found.media_type):
        return []
    value = media.document(data, found.digest)
    parts = [value[name] for name in ("config",) if name in value] + list(value.get("layers", ()))
    return [media.descriptor(each, found.digest) for each in parts]


def size_bytes(source: Repository, reference: str) -> int:
    """Bytes of all blobs of a version, each counted once; attestations not counted."""
    found, data = source.manifest(reference)
    pairs = [(each, source.manifest(each.digest)[1]) for each in children(found, data)] or [(found, data)]
    return sum({blob.digest: blob.size for each, text in pairs for blob in blobs(each, text)}.values())


def child_tag(tag: str, target: str) -> str:
    """The tag of one target of a version. Without it collectors delete the target."""
    return f"{tag}-{target}"[:128]


def versions(repository: Repository) -> list[str]:
    """The tags that people gave: neither referrers nor the targets of another tag."""
    tags = [tag for tag in repository.tags() if not is_internal(tag)]
    targets: set[str] = set()
    for tag in tags:
        found, data = repository.manifest(tag)
        targets |= {
            child_tag(tag, name) for each in children(found, data) if (name := each.annotations.get(media.TARGET))
        }
    return [tag for tag in tags if tag not in targets]
