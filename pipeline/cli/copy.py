"""`enginewright copy`: a version between registries, layout folders and tar files, every digest unchanged."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pipeline.cli import transfer
from pipeline.cli.console import megabytes
from pipeline.errors import NetworkError, RecipeError
from pipeline.registry import places, reference
from pipeline.registry.reference import Reference
from pipeline.registry.repository import Repository
from pipeline.registry.transfer import Copier, size_bytes
from pipeline.registry.version import resolve


@click.command()
@click.argument("source")
@click.argument("destination")
@transfer.force_tag
@transfer.out
@transfer.plain_http
@transfer.form
@transfer.silent
def copy(source: str, destination: str, force_tag: bool, out: Path, plain_http: bool, form: str, quiet: bool) -> None:
    """Copy the version SOURCE to DESTINATION with all its targets and attestations.

    Both are references: HOST/REPOSITORY:TAG, oci:FOLDER:TAG (an OCI image layout), oci-archive:FILE.tar:TAG, or
    local:NAME:TAG. A layout carries a version to where there is no network; skopeo and other tools read it.
    """
    origin, goal = reference.parse(source), reference.parse(destination)
    repository = places.reading(origin, out, plain_http=plain_http)
    done = carry(repository, origin, goal, out, plain_http=plain_http, force=force_tag, hidden=quiet, label="copy")
    if form == "json":
        click.echo(json.dumps(done, indent=2))
    else:
        show(done)


def carry(
    repository: Repository,
    origin: Reference,
    goal: Reference,
    out: Path,
    *,
    plain_http: bool,
    force: bool,
    hidden: bool,
    label: str,
) -> dict[str, Any]:
    """Copy what `origin` stands for to `goal`; what was moved, as a document."""
    if goal.digest:
        raise RecipeError("a digest cannot be written to: it follows from what is copied", hint="give a tag, or none")
    tag = goal.tag or origin.tag
    if not tag:
        raise RecipeError("the copy would have no tag", hint=f"give one: {goal.name}:TAG")
    found, _ = resolve(repository, origin)
    with (
        places.writing(goal, out, plain_http=plain_http) as there,
        transfer.advancing(f"{label} {goal.name}", size_bytes(repository, found.digest), hidden=hidden) as advance,
    ):
        present = there.has_manifest(tag)
        if present and present != found.digest and not force:
            raise NetworkError(
                f"{goal.name}:{tag} stands for {present} already",
                hint="choose another tag, or move it with --force-tag",
            )
        copier = Copier(repository, there, advance)
        copier.version(found.digest, (tag,))
    return {"reference": str(goal.at(tag, found.digest)), "digest": found.digest, **asdict(copier.sent)}


def show(done: dict[str, Any]) -> None:
    """What was moved, for a person."""
    what = f"moved {done['blobs']} files, {megabytes(done['size_bytes'])}" if done["blobs"] else "moved no file"
    click.echo(f"{what}; {done['mounted']} were mounted, {done['present']} were there")
    click.echo(done["reference"])
    transfer.tell_ci({"reference": done["reference"], "digest": done["digest"]})
