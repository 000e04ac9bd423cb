"""`enginewright ls`: the versions of a repository, or the targets of a version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pipeline.cli import transfer
from pipeline.cli.console import megabytes, table
from pipeline.registry import media, places, proof, reference
from pipeline.registry.fallback import is_internal
from pipeline.registry.transfer import children, size_bytes, versions
from pipeline.registry.version import open_version


@click.command()
@click.argument("ref", required=False)
@click.option("--all", "everything", is_flag=True, help="Also the tags that keep targets and attestations alive.")
@transfer.out
@transfer.plain_http
@transfer.form
def ls(ref: str | None, everything: bool, out: Path, plain_http: bool, form: str) -> None:
    """List the local registry; with REF the versions of that repository; with a tag the targets of that version.

    PARITY and SIGNED are what the attestations claim; `verify` with --policy or --key checks who says so.
    """
    if ref is None:
        _show(_local(out), ("model", "version", "size_bytes", "digest"), form)
        return
    where = reference.parse(ref)
    repository = places.reading(where, out, plain_http=plain_http)
    if where.tag or where.digest:
        version = open_version(repository, where)
        said = proof.said_of(version)
        rows = [
            {
                "target": each.manifest.target.name,
                "runtime": each.manifest.runtime.engine,
                "precision": each.manifest.precision,
                "size_bytes": each.manifest.size_bytes,
                "parity": proof.parity("", said[each.manifest.target.name]).verdict,
                "signed": any(name.endswith(".dsse") for name in said[each.manifest.target.name]),
                "artifact_id": each.artifact_id,
            }
            for each in version.targets
        ]
        _show(rows, tuple(rows[0]), form)
        return
    tags = repository.tags() if everything else versions(repository)
    rows = []
    for tag in tags:
        found, data = repository.manifest(tag)
        targets = [each.annotations.get(media.TARGET, "?") for each in children(found, data)]
        internal = is_internal(tag)
        rows.append(
            {
                "tag": tag,
                "targets": [] if internal else targets,
                "size_bytes": 0 if internal else size_bytes(repository, tag),
                "digest": found.digest,
            }
        )
    _show(rows, ("tag", "targets", "size_bytes", "digest"), form)


def _local(out: Path) -> list[dict[str, Any]]:
    """Every version of every model in the local registry."""
    rows = []
    folder = out / places.LOCAL
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        layout = places.local(out, place.name)
        for tag in versions(layout):
            digest = layout.has_manifest(tag)
            rows.append({"model": place.name, "version": tag, "size_bytes": size_bytes(layout, tag), "digest": digest})
    return rows


def _show(rows: list[dict[str, Any]], columns: tuple[str, ...], form: str) -> None:
    if form == "json":
        click.echo(json.dumps(rows, indent=2))
        return
    heads = [column.removesuffix("_bytes").replace("_id", "").upper() for column in columns]
    click.echo(table(heads, [[_cell(column, row[column]) for column in columns] for row in rows]))


def _cell(column: str, value: Any) -> str:
    if column.endswith("_bytes"):
        return megabytes(value)
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
