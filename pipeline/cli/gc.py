"""`enginewright gc`: the local registry without what no version needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from pipeline.cli import transfer
from pipeline.cli.console import megabytes
from pipeline.errors import RecipeError
from pipeline.registry import places, reference
from pipeline.registry.collect import collect
from pipeline.registry.media import TARGET
from pipeline.registry.transfer import child_tag, children


@click.command()
@click.option("--remove", "refs", multiple=True, metavar="REF", help="First forget local:NAME:TAG (may be repeated).")
@transfer.out
def gc(refs: Sequence[str], out: Path) -> None:
    """Remove from the local registry what no tag leads to, and what killed pulls left.

    Artifacts in their folders stay as they are. A model that is being pulled now is left alone.
    """
    for text in refs:
        where = reference.parse(text)
        if where.kind != "local" or not where.tag:
            raise RecipeError(f"{text!r} is not a version of the local registry", hint="give local:NAME:TAG")
        layout = places.local(out, where.repository)
        tags = layout.tagged()
        if where.tag not in tags:
            raise RecipeError(f"{text} is not there", hint="`enginewright ls` shows what is")
        found, data = layout.manifest(where.tag)
        names = {each.annotations.get(TARGET, "") for each in children(found, data)}
        layout.remove_tags(where.tag, *(child_tag(where.tag, name) for name in names if name))
    folder = out / places.LOCAL
    files = size_bytes = 0
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        done = collect(places.local(out, place.name))
        if done.in_use:
            click.echo(f"{place.name}: in use now, left alone", err=True)
        files += done.files
        size_bytes += done.size_bytes
    click.echo(f"removed {files} files, {megabytes(size_bytes)}")
