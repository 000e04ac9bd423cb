"""A version in a repository: its targets with their manifests read, and the one that a machine should have."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.artifact import paths
from pipeline.artifact.manifest import Manifest
from pipeline.errors import RecipeError, UnavailableError, VerificationError
from pipeline.frozen import frozen
from pipeline.hardware import Hardware
from pipeline.registry import media, select
from pipeline.registry.media import Descriptor
from pipeline.registry.pack import Unpacked, unpack
from pipeline.registry.reference import Reference
from pipeline.registry.repository import Repository
from pipeline.registry.select import Fit
from pipeline.registry.transfer import children


@frozen
class Version:
    """What a reference stands for. A manifest that is no index is a version of one target."""

    repository: Repository
    descriptor: Descriptor
    targets: tuple[Unpacked, ...]

    def named(self, target: str) -> Unpacked:
        """The target of a name. RecipeError when there is none."""
        for each in self.targets:
            if each.manifest.target.name == target:
                return each
        names = ", ".join(each.manifest.target.name for each in self.targets)
        raise RecipeError(
            f"there is no target {target!r} in {self.repository.reference.name}", hint=f"there are: {names}"
        )


def resolve(repository: Repository, reference: Reference) -> tuple[Descriptor, bytes]:
    """The manifest that a reference means. VerificationError when its tag no longer stands for its digest."""
    if reference.tag and reference.digest:
        now = repository.has_manifest(reference.tag)
        if now != reference.digest:
            what = f"stands for {now} now" if now else "is gone"
            raise VerificationError(
                f"{reference.name}: the tag {reference.tag} {what}, not for {reference.digest}",
                hint="somebody has moved it: ask why; the digest alone, without the tag, is still that version",
            )
    return repository.manifest(reference.wanted)


def open_version(repository: Repository, reference: Reference) -> Version:
    """Read the index and every target's manifests; no file. VerificationError when one of them is not sound."""
    found, data = resolve(repository, reference)
    listed = children(found, data) if media.is_index(found.media_type) else [found]
    if not listed:
        raise VerificationError(f"{reference} is an empty index", hint="push it again")
    targets = tuple(unpack(repository, each.digest) for each in listed)
    seen: set[str] = set()
    for each in targets:
        for what in (each.manifest.name, each.manifest.target.name):
            if "/" in what or what.startswith(".") or paths.path_problem(what):
                raise VerificationError(f"{reference}: {what!r:.100} is no name that a folder may have")
        if each.manifest.target.name in seen:
            raise VerificationError(f"{reference} has two targets called {each.manifest.target.name!r:.100}")
        seen.add(each.manifest.target.name)
    return Version(repository, found.bare, targets)


def choose(version: Version, hardware: Hardware, *, runtimes: bool = True) -> tuple[Unpacked, list[Fit]]:
    """The target for a machine, and the verdict on each. UnavailableError with all reasons when none fits."""
    manifests: Sequence[Manifest] = [each.manifest for each in version.targets]
    fits = select.rank(manifests, hardware, runtimes=runtimes)
    if not fits[0].ok:
        told = "".join(f"\n  {each.target}: {each.reason}" for each in fits)
        raise UnavailableError(
            f"no target of {version.repository.reference.name} fits this machine ({hardware.name}):{told}",
            hint="--target NAME takes one all the same; --ignore-runtime judges by the hardware alone",
        )
    return version.named(fits[0].target), fits
