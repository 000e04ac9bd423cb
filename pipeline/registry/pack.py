"""An artifact as OCI sees it: one ModelPack manifest, a layer a file, byte for byte the same each time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifact import paths
from pipeline.artifact.manifest import Manifest, artifact_id
from pipeline.artifact.read import decode, load
from pipeline.digest import canonical
from pipeline.errors import VerificationError
from pipeline.frozen import frozen
from pipeline.registry import media
from pipeline.registry.media import Descriptor
from pipeline.registry.repository import Repository
from pipeline.registry.stream import small

ARCH = {"x86_64": "amd64", "aarch64": "arm64"}
FORMATS = {"onnxruntime": "onnx", "gguf": "gguf", "openvino": "openvino", "transformers": "safetensors"}


@frozen
class Packed:
    """One target, ready to be stored: `files` are paths in the artifact's folder by digest."""

    folder: Path
    manifest: Manifest
    artifact_id: str
    config: bytes
    data: bytes
    """The OCI manifest."""
    descriptor: Descriptor
    """As the index lists it."""
    layers: Mapping[str, Descriptor]
    """Path in the artifact -> layer, manifest.json first."""

    @property
    def config_descriptor(self) -> Descriptor:
        """The configuration's blob."""
        return media.described(media.MODEL_CONFIG, self.config)


def pack(folder: Path) -> Packed:
    """The OCI manifest of the artifact in a folder. VerificationError when a file is missing or has another size."""
    manifest, data = load(folder)
    problems = []
    for file in manifest.files:
        place = folder / file.path
        if place.is_symlink() or not place.is_file():
            problems.append(f"{file.path}: is missing")
        elif place.stat().st_size != file.size:
            problems.append(f"{file.path}: has {place.stat().st_size} bytes, and the manifest says {file.size}")
    if problems:
        raise VerificationError(
            f"{folder} is not what its manifest says:" + "".join(f"\n  {each}" for each in problems),
            hint="build it again; nothing was sent",
        )
    identity = artifact_id(data)
    layers = {paths.MANIFEST: _layer(paths.MANIFEST, media.MODEL_FILE, identity, len(data))}
    layers |= {file.path: _layer(file.path, file.media_type, file.digest, file.size) for file in manifest.files}
    config = canonical(_config(manifest, layers))
    value = {
        "schemaVersion": 2,
        "mediaType": media.MANIFEST,
        "artifactType": media.MODEL,
        "config": media.described(media.MODEL_CONFIG, config).plain(),
        "layers": [layer.plain() for layer in layers.values()],
        "annotations": _annotations(manifest, identity),
    }
    made = canonical(value)
    # No artifactType here: skopeo 1.9 drops it from an index, whose digest would change.
    entry = media.described(
        media.MANIFEST,
        made,
        platform={"os": manifest.target.os, "architecture": ARCH.get(manifest.target.arch, manifest.target.arch)},
        annotations=_annotations(manifest, identity),
    )
    return Packed(folder, manifest, identity, config, made, entry, layers)


def index(packed: list[Descriptor], manifest: Manifest) -> bytes:
    """The index of a version."""
    return canonical(
        {
            "schemaVersion": 2,
            "mediaType": media.INDEX,
            "manifests": [each.plain() for each in packed],
            "annotations": {media.TITLE: manifest.name, media.VERSION: manifest.version},
        }
    )


@frozen
class Unpacked:
    """One target of a repository, its two manifests read and held against each other; no file was fetched."""

    descriptor: Descriptor
    manifest: Manifest
    manifest_data: bytes
    artifact_id: str
    layers: Mapping[str, Descriptor]
    """Path -> layer, without manifest.json."""


def unpack(repository: Repository, digest: str) -> Unpacked:
    """Read a target's manifests. VerificationError with every layer that the artifact's own manifest does not list."""
    found, data = repository.manifest(digest)
    where = f"{repository.reference.name}@{found.digest}"
    value = media.document(data, where)
    if media.is_index(found.media_type):
        raise VerificationError(f"{where} is an index, not a target", hint="give one of the targets that it lists")
    layers: dict[str, Descriptor] = {}
    problems: list[str] = []
    for each in value.get("layers", ()):
        layer = media.descriptor(each, where)
        path = layer.annotations.get(media.PATH) or layer.annotations.get(media.TITLE) or ""
        if problem := paths.path_problem(path):
            problems.append(f"a layer's path {path!r:.200} {problem}")
        elif path in layers:
            problems.append(f"{path}: stands twice")
        layers[path] = layer
    own = layers.pop(paths.MANIFEST, None)
    if own is None:
        raise VerificationError(
            f"{where} is not an artifact of enginewright: it has no {paths.MANIFEST}",
            hint="check the reference: other tools' models have no manifest to check them by",
        )
    manifest_data = small(repository, own, media.MAX_ATTESTATION, paths.MANIFEST)
    manifest, wrong = decode(manifest_data)
    problems += [f"{paths.MANIFEST}: {each}" for each in wrong]
    for file in manifest.files if manifest else ():
        known = layers.get(file.path)
        if known is None:
            problems.append(f"{file.path}: the registry has no layer for it")
        elif known.digest != file.digest:
            problems.append(f"{file.path}: the registry has {known.digest}, and the manifest says {file.digest}")
        elif known.size != file.size:
            problems.append(f"{file.path}: the registry says {known.size} bytes, and the manifest {file.size}")
    listed = {file.path for file in manifest.files} if manifest else set(layers)
    problems += [f"{path!r:.200}: is not in the manifest" for path in layers if path not in listed]
    if problems or manifest is None:
        raise VerificationError(
            f"{where} is not what its manifest says ({len(problems)} problem{'s' * (len(problems) > 1)}):"
            + "".join(f"\n  {each}" for each in problems[:100]),
            hint="do not use it: push it again",
        )
    return Unpacked(found.bare, manifest, manifest_data, artifact_id(manifest_data), layers)


def _layer(path: str, media_type: str, digest: str, size: int) -> Descriptor:
    return Descriptor(media_type, digest, size, {media.PATH: path, media.TITLE: path})


def _annotations(manifest: Manifest, identity: str) -> dict[str, str]:
    return {
        media.TARGET: manifest.target.name,
        media.ARTIFACT: identity,
        media.VERSION: manifest.version,
        media.TITLE: manifest.name,
    }


def _config(manifest: Manifest, layers: Mapping[str, Descriptor]) -> dict[str, Any]:
    """ModelPack's configuration. Its schema is closed: what it does not know is in manifest.json."""
    about: dict[str, Any] = {"name": manifest.name, "version": manifest.version}
    if manifest.licenses:
        about["licenses"] = list(manifest.licenses)
    source = next((each for each in manifest.sources if each.name == "model" and each.revision), None)
    if source and source.revision:
        about["revision"] = source.revision
    config: dict[str, Any] = {"precision": manifest.precision}
    if form := FORMATS.get(manifest.runtime.engine):
        config["format"] = form
    if manifest.quantization:
        config["quantization"] = str(manifest.quantization.get("method", manifest.precision))
    return {
        "descriptor": about,
        "config": config,
        "modelfs": {"type": "layers", "diffIds": [layer.digest for layer in layers.values()]},
    }
