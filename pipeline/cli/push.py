"""`enginewright push`: artifacts into a registry, a layout folder or a tar file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from pipeline.cli import transfer
from pipeline.cli.console import megabytes
from pipeline.errors import RecipeError
from pipeline.registry import places, reference
from pipeline.registry import push as pushing


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH... REF")
@click.option("--add", is_flag=True, help="Keep the other targets that the version has already.")
@transfer.force_tag
@transfer.out
@transfer.plain_http
@transfer.form
@transfer.silent
def push(paths: Sequence[str], add: bool, force_tag: bool, out: Path, plain_http: bool, form: str, quiet: bool) -> None:
    """Push the artifacts in the folders PATH to REF, as one version with a target each.

    PATH is the folder of one target, or artifacts/NAME with all of them. REF is HOST/REPOSITORY[:TAG],
    oci:FOLDER[:TAG], oci-archive:FILE.tar[:TAG] or local:NAME[:TAG]; without a tag the recipe's version is the tag.
    What is there already is not sent; the tag comes last, so that nobody sees half a version.
    """
    if len(paths) < 2:
        raise RecipeError("push needs artifacts and where to: PATH... REF", hint=reference.HINT)
    where = reference.parse(paths[-1])
    if where.digest:
        raise RecipeError("a digest cannot be pushed to: it follows from what is pushed", hint="give a tag, or none")
    packed = pushing.prepare([Path(path) for path in paths[:-1]])
    total = pushing.total_bytes(packed)
    with (
        places.writing(where, out, plain_http=plain_http) as repository,
        transfer.advancing(f"push {where.name}", total, hidden=quiet) as advance,
    ):
        done = pushing.push(packed, repository, where.tag, add=add, force=force_tag, advance=advance)
    pinned = str(where.at(done.tag, done.digest))
    if form == "json":
        document = {"reference": pinned, **asdict(done)}
        click.echo(json.dumps(document, indent=2))
    else:
        sent = done.sent
        for name, identity in done.targets.items():
            click.echo(f"{name}  {identity}")
        what = f"sent {sent.blobs} files, {megabytes(sent.size_bytes)}" if sent.blobs else "sent no file"
        click.echo(f"{what}; {sent.present} were there; {done.attested} attestations added")
        click.echo(pinned)
    transfer.tell_ci(
        {"reference": pinned, "digest": done.digest},
        ["| target | artifact |", "|---|---|", *(f"| {name} | `{each}` |" for name, each in done.targets.items()), "",
         f"Pushed as `{pinned}`."],
    )  # fmt: skip
