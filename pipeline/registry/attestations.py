"""Attestations in a repository: each file of `.attest/` is a manifest that refers to its target."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.artifact import attest, dsse, paths
from pipeline.artifact.attest import statement_problem
from pipeline.digest import canonical
from pipeline.errors import VerificationError
from pipeline.registry import media
from pipeline.registry.media import Descriptor
from pipeline.registry.repository import Repository
from pipeline.registry.stream import of_bytes, small

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,60}\.(json|dsse)")
MAX_COUNT = 64


def of_folder(artifact: Path) -> dict[str, bytes]:
    """File name -> bytes, of the attestations beside an artifact."""
    folder = artifact / paths.ATTESTATIONS
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: path.read_bytes() for path in names if NAME.fullmatch(path.name) and not path.is_symlink()}


def problem(name: str, data: bytes, artifact_id: str) -> str | None:
    """Why a file is no attestation of this artifact, or None."""
    return dsse.problem(data, artifact_id) if name.endswith(".dsse") else statement_problem(data, artifact_id)


def predicate_type(name: str, data: bytes) -> str:
    """What an attestation that has no `problem` speaks of."""
    value = dsse.statement(data) if name.endswith(".dsse") else json.loads(data)
    return str(value.get("predicateType", ""))


def packed(name: str, data: bytes, subject: Descriptor) -> tuple[Descriptor, bytes]:
    """An attestation's blob and the manifest that ties it to its subject; equal bytes for equal content."""
    kind = media.ENVELOPE if name.endswith(".dsse") else media.STATEMENT
    blob = media.described(kind, data, annotations={media.TITLE: name})
    value = {
        "schemaVersion": 2,
        "mediaType": media.MANIFEST,
        "artifactType": kind,
        "config": media.EMPTY_CONFIG.plain(),
        "layers": [blob.plain()],
        "subject": subject.bare.plain(),
        "annotations": {media.TITLE: name, media.PREDICATE: predicate_type(name, data)},
    }
    return blob, canonical(value)


def attach(repository: Repository, subject: Descriptor, files: Mapping[str, bytes], artifact_id: str) -> int:
    """Store what is not there yet; how many were. VerificationError for a file that speaks of another artifact."""
    present = {each.digest for each in repository.referrers(subject.digest)} if files else set()
    new = []
    for name, data in files.items():
        if wrong := problem(name, data, artifact_id):
            raise VerificationError(f"{paths.ATTESTATIONS}/{name} {wrong}", hint="delete it; nothing was sent of it")
        blob, manifest = packed(name, data, subject)
        if media.described("", manifest).digest in present:
            continue
        for each, source in ((media.EMPTY_CONFIG, media.EMPTY_DATA), (blob, data)):
            if not repository.has_blob(each):
                repository.write_blob(each, of_bytes(source))
        new.append(manifest)
    if new:
        repository.attach(new, subject.digest)
    return len(new)


def fetch(repository: Repository, subject: str, artifact_id: str) -> dict[str, bytes]:
    """File name -> bytes of every attestation of a target; of several with a name the others are numbered.

    The name itself goes to one that judges something, before those that were deferred.

    VerificationError for one that speaks of another artifact: somebody has tied it to this one.
    """
    pairs: list[tuple[str, bytes]] = []
    listed = repository.referrers(subject)
    if len(listed) > MAX_COUNT:
        raise VerificationError(f"{subject} has {len(listed)} referrers, and {MAX_COUNT} are looked at")
    for entry in sorted(listed, key=lambda each: each.digest):
        if entry.artifact_type and entry.artifact_type not in (media.STATEMENT, media.ENVELOPE):
            continue
        _, data = repository.manifest(entry.digest)
        value = media.document(data, entry.digest)
        for layer in _layers(value.get("layers", ()), entry.digest):
            name = layer.annotations.get(media.TITLE, "")
            if layer.media_type not in (media.STATEMENT, media.ENVELOPE):
                continue
            if not NAME.fullmatch(name):
                raise VerificationError(f"{entry.digest}: {name!r:.80} is no name of an attestation")
            content = small(repository, layer, media.MAX_ATTESTATION, name)
            if wrong := problem(name, content, artifact_id):
                raise VerificationError(
                    f"{repository.reference.name}: {name} ({entry.digest}) {wrong}",
                    hint="it was tied to this artifact by mistake or by malice: have it removed",
                )
            pairs.append((name, content))
    found: dict[str, bytes] = {}
    for name, content in sorted(pairs, key=lambda pair: not judged(*pair)):
        found[_free(name, content, found)] = content
    return found


def judged(name: str, data: bytes) -> bool:
    """Whether it holds a verdict on something that ran."""
    value = dsse.statement(data) if name.endswith(".dsse") else json.loads(data)
    return attest.judged(value["predicate"])


def _layers(values: Iterable[object], where: str) -> list[Descriptor]:
    return [media.descriptor(each, where) for each in values]


def _free(name: str, data: bytes, taken: Mapping[str, bytes]) -> str:
    """The name, or the next one that is free: `parity.2.json`."""
    stem, _, suffix = name.rpartition(".")
    chosen, number = name, 2
    while chosen in taken and taken[chosen] != data:
        chosen, number = f"{stem}.{number}.{suffix}", number + 1
    return chosen
