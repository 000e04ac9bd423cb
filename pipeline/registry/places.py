"""From a reference to the repository that it names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import NetworkError
from pipeline.registry.archive import ArchiveReader, ArchiveWriter
from pipeline.registry.layout import Layout
from pipeline.registry.reference import Reference
from pipeline.registry.remote import Remote
from pipeline.registry.repository import Repository

LOCAL = ".registry"
"""The folder beside the artifacts that holds a layout for each model."""


def local(artifacts: Path, name: str) -> Layout:
    """The layout of a model in the local registry."""
    return Layout(artifacts / LOCAL / name, Reference("local", "", name))


def reading(reference: Reference, artifacts: Path, *, plain_http: bool = False) -> Repository:
    """A repository to read from. NetworkError when it is a place on this disk and not there."""
    if reference.kind == "registry":
        return Remote(reference, plain_http=plain_http)
    if reference.kind == "archive":
        return ArchiveReader(Path(reference.place), reference)
    found = _layout(reference, artifacts)
    if not (found.root / "oci-layout").is_file():
        raise NetworkError(
            f"{reference.name} is not there: {found.root} is no OCI layout", hint="check its name, and --out"
        )
    return found


@contextlib.contextmanager
def writing(reference: Reference, artifacts: Path, *, plain_http: bool = False) -> Iterator[Repository]:
    """A repository to write to; a tar file takes its place when the block ends well."""
    if reference.kind == "registry":
        yield Remote(reference, plain_http=plain_http)
    elif reference.kind == "archive":
        made = ArchiveWriter(Path(reference.place), reference)
        try:
            yield made
            made.finish()
        except BaseException:
            made.discard()
            raise
    else:
        found = _layout(reference, artifacts)
        with found.using():
            yield found


def _layout(reference: Reference, artifacts: Path) -> Layout:
    if reference.kind == "local":
        return local(artifacts, reference.repository)
    return Layout(Path(reference.place), reference)
