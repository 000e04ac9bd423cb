"""The words of OCI and of CNCF ModelPack 0.0.7, and a descriptor: every constant of other people's formats is here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from pipeline.artifact.paths import digest_problem, size_problem
from pipeline.errors import VerificationError
from pipeline.frozen import frozen

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
EMPTY_DATA = b"{}"
MODEL = "application/vnd.cncf.model.manifest.v1+json"
MODEL_CONFIG = "application/vnd.cncf.model.config.v1+json"
MODEL_FILE = "application/vnd.cncf.model.weight.config.v1.raw"
"""What manifest.json is as a layer."""
STATEMENT = "application/vnd.in-toto+json"
ENVELOPE = "application/vnd.dsse.envelope.v1+json"
# Docker's own names of the same things, which other tools' repositories may hold.
DOCKER = (
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)

PATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"
VERSION = "org.opencontainers.image.version"
REF_NAME = "org.opencontainers.image.ref.name"
PREDICATE = "in-toto.io/predicate-type"
TARGET = "io.github.enginewright.target"
ARTIFACT = "io.github.enginewright.artifact-id"

MAX_MANIFEST = 4 * 2**20
"""Bytes; what registries take."""
MAX_ATTESTATION = 16 * 2**20


@frozen
class Descriptor:
    """What OCI points with."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        found: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type:
            found["artifactType"] = self.artifact_type
        if self.annotations:
            found["annotations"] = dict(self.annotations)
        if self.platform:
            found["platform"] = dict(self.platform)
        return found

    @property
    def bare(self) -> Descriptor:
        """Type, digest and size alone."""
        return Descriptor(self.media_type, self.digest, self.size)


EMPTY_CONFIG = Descriptor(EMPTY, f"sha256:{hashlib.sha256(EMPTY_DATA).hexdigest()}", len(EMPTY_DATA))


def described(media_type: str, data: bytes, **more: Any) -> Descriptor:
    """The descriptor of some bytes."""
    return Descriptor(media_type, f"sha256:{hashlib.sha256(data).hexdigest()}", len(data), **more)


def descriptor(value: Any, where: str) -> Descriptor:
    """A descriptor from JSON that came from outside. VerificationError for what is none."""
    if not isinstance(value, dict):
        raise VerificationError(f"{where}: a descriptor is not an object")
    kind, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
    if not isinstance(kind, str) or not isinstance(digest, str) or digest_problem(digest):
        raise VerificationError(f"{where}: {str(digest)!r:.90} is not a digest that is known here (sha256)")
    if type(size) is not int or size_problem(size):
        raise VerificationError(f"{where}: {str(size)!r:.40} of {digest} is not a size")
    texts: list[dict[str, str]] = []
    for name in ("annotations", "platform"):
        found = value.get(name) or {}
        if not isinstance(found, dict):
            raise VerificationError(f"{where}: the {name} of {digest} are not an object")
        texts.append({str(key): item for key, item in found.items() if isinstance(item, str)})
    artifact = value.get("artifactType")
    return Descriptor(kind, digest, size, texts[0], texts[1], artifact if isinstance(artifact, str) else "")


def document(data: bytes, where: str) -> dict[str, Any]:
    """A manifest or an index from its bytes. VerificationError for what is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise VerificationError(f"{where} is not JSON") from None
    if not isinstance(value, dict) or value.get("schemaVersion") != 2:
        raise VerificationError(f"{where} is not an OCI manifest or index")
    for name in ("layers", "manifests"):
        if not isinstance(value.get(name, []), list):
            raise VerificationError(f"{where}: {name} is not a list")
    return value


def kind_of(value: Mapping[str, Any]) -> str:
    """The media type of a manifest or an index; what it says of itself, else what it looks like."""
    said = value.get("mediaType")
    if isinstance(said, str) and said:
        return said
    return INDEX if "manifests" in value else MANIFEST


def is_index(media_type: str) -> bool:
    """Whether it lists manifests."""
    return media_type in (INDEX, DOCKER[1])
