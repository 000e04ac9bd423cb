"""Push: artifacts of one version into a repository, each a manifest, under one index. What is there is not sent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.artifact import paths
from pipeline.artifact.read import not_draft
from pipeline.errors import NetworkError, RecipeError
from pipeline.frozen import frozen
from pipeline.registry import attestations, media
from pipeline.registry.crew import together
from pipeline.registry.media import Descriptor
from pipeline.registry.pack import Packed, index, pack
from pipeline.registry.reference import version_tag
from pipeline.registry.repository import Advance, Repository, quiet
from pipeline.registry.stream import of_bytes, of_file
from pipeline.registry.transfer import Sent, child_tag, children


@frozen
class Pushed:
    """What is in the repository now, and what had to be sent for it."""

    digest: str
    """Of the index."""
    tag: str
    targets: dict[str, str]
    """Target -> artifact_id."""
    children: dict[str, str]
    """Target -> digest of its manifest."""
    sent: Sent
    attested: int
    """Attestations that were not there before."""


def folders(given: Sequence[Path]) -> list[Path]:
    """Artifacts' folders: each given one, or where it holds artifacts, those. RecipeError where there is none."""
    found: list[Path] = []
    for path in given:
        if (path / paths.MANIFEST).exists() or not path.is_dir():
            found.append(path)
            continue
        inner = sorted(each.parent for each in path.glob(f"[!.]*/{paths.MANIFEST}"))
        if not inner:
            not_draft(path)
            raise RecipeError(f"{path} holds no artifact", hint="give artifacts/NAME, or the folder of one target")
        found += inner
    return found


def prepare(given: Sequence[Path]) -> list[Packed]:
    """The targets to push. RecipeError when they are not of one model and version."""
    packed = [pack(folder) for folder in folders(given)]
    names = {(each.manifest.name, each.manifest.version) for each in packed}
    if len(names) > 1:
        told = ", ".join(sorted(f"{name} {version}" for name, version in names))
        raise RecipeError(f"these are not targets of one version: {told}", hint="push one version at a time")
    seen: set[str] = set()
    for each in packed:
        if each.manifest.target.name in seen:
            raise RecipeError(
                f"two artifacts are for the target {each.manifest.target.name!r}", hint="push one of them"
            )
        seen.add(each.manifest.target.name)
    return packed


def total_bytes(packed: Sequence[Packed]) -> int:
    """Bytes of all blobs, each counted once."""
    return sum({layer.digest: layer.size for each in packed for layer in each.layers.values()}.values())


def push(
    packed: Sequence[Packed],
    repository: Repository,
    tag: str = "",
    *,
    add: bool = False,
    force: bool = False,
    advance: Advance = quiet,
) -> Pushed:
    """Store the targets and put the index of the version under `tag` (default: the version), last of all.

    `add` keeps the targets that the version has already; `force` moves a tag that stands for something else. Raises
    NetworkError when the tag stands for something else and neither is given, VerificationError when a file is not the
    one that its manifest lists: then no tag was touched.
    """
    manifest = packed[0].manifest
    tag = tag or version_tag(manifest.version)
    entries = [each.descriptor for each in packed]
    present = repository.has_manifest(tag)
    if present:
        entries = _merged(repository, tag, entries, add=add, force=force)
    data = index(entries, manifest)
    sent = Sent()
    done: set[str] = set()
    attested = 0
    for each in packed:
        _blobs(each, repository, sent, done, advance)
        name = child_tag(tag, each.manifest.target.name)
        if repository.has_manifest(name) != each.descriptor.digest:
            repository.put_manifest(each.data, media.MANIFEST, name)
            sent.manifests += 1
        files = attestations.of_folder(each.folder)
        attested += attestations.attach(repository, each.descriptor, files, each.artifact_id)
    digest = media.described(media.INDEX, data).digest
    if present != digest:
        repository.put_manifest(data, media.INDEX, tag)
        sent.manifests += 1
    return Pushed(
        digest,
        tag,
        {each.manifest.target.name: each.artifact_id for each in packed},
        {each.manifest.target.name: each.descriptor.digest for each in packed},
        sent,
        attested,
    )


def _merged(repository: Repository, tag: str, entries: list[Descriptor], *, add: bool, force: bool) -> list[Descriptor]:
    """The entries of the new index where the tag stands for something already."""
    found, data = repository.manifest(tag)
    old = children(found, data)
    names = {each.annotations.get(media.TARGET): each for each in entries}
    kept = [each for each in old if each.annotations.get(media.TARGET) not in names]
    changed = [
        name
        for each in old
        if (name := each.annotations.get(media.TARGET)) in names and names[name].digest != each.digest
    ]
    where = f"{repository.reference.name}:{tag}"
    if changed and not force:
        raise NetworkError(
            f"{where} has another {changed[0]!r} already: a version that others may use would change",
            hint="raise the recipe's version, or replace it with --force-tag",
        )
    if add:
        # What is there keeps its place: the order is what decides between equal targets.
        return [names.pop(each.annotations.get(media.TARGET), each) for each in old] + list(names.values())
    if (kept or not media.is_index(found.media_type)) and not force:
        told = ", ".join(str(each.annotations.get(media.TARGET)) for each in kept) or "something else"
        raise NetworkError(
            f"{where} stands for {told} already", hint="keep that with --add, or replace it with --force-tag"
        )
    return entries


def _blobs(packed: Packed, repository: Repository, sent: Sent, done: set[str], advance: Advance) -> None:
    """Send what is missing."""
    config = packed.config_descriptor
    if not repository.has_blob(config):
        repository.write_blob(config, of_bytes(packed.config))
        sent.blobs += 1
        sent.size_bytes += config.size
    missing = {layer.digest: (path, layer) for path, layer in packed.layers.items() if layer.digest not in done}
    done.update(missing)

    def send(each: tuple[str, Descriptor], advance: Advance) -> bool:
        path, layer = each
        if repository.has_blob(layer):
            advance(layer.size)
            return False
        repository.write_blob(layer, of_file(packed.folder / path, layer), advance)
        return True

    layers = list(missing.values())
    for (_, layer), new in zip(layers, together(send, layers, advance, repository.workers), strict=True):
        sent.present += not new
        sent.blobs += new
        sent.size_bytes += layer.size * new
