"""A repository of a registry: `oci://registry.example.org/team/store`. A result is a manifest, tagged by its key.

A registry cannot refuse a tag that is there already: of two writers the last wins. Both read again what came of it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import NetworkError, VerificationError
from pipeline.registry import media
from pipeline.registry.client import Refused
from pipeline.registry.crew import together
from pipeline.registry.media import Descriptor
from pipeline.registry.reference import TAG, Reference
from pipeline.registry.remote import Remote
from pipeline.registry.repository import Advance
from pipeline.registry.stream import of_bytes, of_file, small, verified
from pipeline.shared.denied import DeniedError
from pipeline.shared.record import MAX_BYTES, File

RESULT = "application/vnd.enginewright.result.v1"
RECORD = f"{RESULT}+json"


class Images:
    """Results as manifests: the record is the configuration, the files are the layers."""

    def __init__(self, reference: Reference) -> None:
        self._repository = Remote(reference)
        self.name = f"oci://{reference.name}"

    def record(self, key: str) -> bytes | None:
        with self._explained():
            try:
                found, data = self._repository.manifest(_tag(key))
            except NetworkError as error:
                if _status(error) == 404:
                    return None
                raise
            value = media.document(data, f"{self.name}:{_tag(key)}")
            return small(self._repository, media.descriptor(value.get("config"), found.digest), MAX_BYTES)
        return None

    def fetch(self, blob: File, path: Path) -> bool:
        with self._explained(), path.open("xb") as stream:
            try:
                for block in verified(self._repository, _described(blob)):
                    stream.write(block)
            except NetworkError as error:
                if _status(error) == 404:
                    return False
                raise
        return True

    def put(
        self, key: str, record: bytes, blobs: Sequence[tuple[File, Path]], *, damaged: frozenset[str], replace: bool
    ) -> None:
        def send(each: tuple[File, Path], advance: Advance) -> None:
            blob, path = each
            described = _described(blob)
            if blob.digest in damaged or not self._repository.has_blob(described):
                self._repository.write_blob(described, of_file(path, described), advance)

        with self._explained():
            together(send, blobs, lambda size: None, self._repository.workers)
            if not replace and self._repository.has_manifest(_tag(key)):
                return
            config = media.described(RECORD, record)
            if not self._repository.has_blob(config):
                self._repository.write_blob(config, of_bytes(record))
            layers = [{**_described(blob).plain(), "annotations": {media.TITLE: blob.path}} for blob, _ in blobs]
            manifest = {
                "schemaVersion": 2,
                "mediaType": media.MANIFEST,
                "artifactType": RESULT,
                "config": config.plain(),
                "layers": layers or [media.EMPTY_CONFIG.plain()],
            }
            if not layers:
                self._repository.write_blob(media.EMPTY_CONFIG, of_bytes(media.EMPTY_DATA))
            self._repository.put_manifest(json.dumps(manifest, sort_keys=True).encode(), media.MANIFEST, _tag(key))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except VerificationError:
            raise
        except NetworkError as error:
            if _status(error) in (401, 403, 405):
                raise DeniedError(error.message, hint=error.hint) from error
            raise


def _status(error: NetworkError) -> int:
    """What the registry answered; 0 where it was no answer that failed."""
    return error.__cause__.status if isinstance(error.__cause__, Refused) else 0


def _described(blob: File) -> Descriptor:
    return Descriptor("application/octet-stream", blob.digest, blob.size)


def _tag(key: str) -> str:
    """A key as a tag: stages' names and hex digits are within what a tag may hold."""
    if not TAG.fullmatch(key):
        raise VerificationError(f"{key} cannot be a tag")
    return key
