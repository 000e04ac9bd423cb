"""`enginewright drift`: would a rebuild differ from what was built, and why?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.artifact.facts import build_key, resolved_recipe
from pipeline.artifact.manifest import Manifest, thaw
from pipeline.artifact.read import load
from pipeline.cli import transfer
from pipeline.cli.diff import differences, flat, short
from pipeline.cli.prepare import Prepared, prepare
from pipeline.registry import places, reference
from pipeline.registry.version import open_version
from pipeline.store import open_store


@click.command()
@click.argument("recipe", type=transfer.FILE)
@click.argument("ref", required=False)
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field of the recipe.")
@click.option("--target", "only", multiple=True, metavar="NAME", help="Only this target (may be repeated).")
@click.option("--update", is_flag=True, help="Ask the hub again which commit a branch or tag means.")
@click.option("--offline", is_flag=True, help="Use no network for the sources.")
@click.option("--detailed-exitcode", is_flag=True, help="0 nothing would differ, 2 something would, 1 error.")
@click.option("--cache", "root", type=transfer.FILE, help="The store. Default: $ENGINEWRIGHT_CACHE or ~/.cache.")
@transfer.out
@transfer.plain_http
@transfer.form
def drift(
    recipe: Path,
    ref: str | None,
    overrides: Sequence[str],
    only: Sequence[str],
    update: bool,
    offline: bool,
    detailed_exitcode: bool,
    root: Path | None,
    out: Path,
    plain_http: bool,
    form: str,
) -> int:
    """Say whether building RECIPE now would ask for something else than what is in artifacts/, or in REF.

    Compared are the resolved recipe, the sources' digests, and every step's version and tools; nothing is built.
    """
    prepared = prepare(
        recipe, open_store(root), overrides=overrides, only=only, offline=offline, update=update, write_lock=False
    )
    built = _built(prepared, ref, out, plain_http)
    rows: dict[str, list[str]] = {}
    for name in prepared.plan.targets:
        manifest = built.get(name)
        rows[name] = ["it was never built"] if manifest is None else _reasons(prepared, name, manifest)
    drifted = {name: reasons for name, reasons in rows.items() if reasons}
    if form == "json":
        document = [{"target": name, "drift": bool(reasons), "reasons": reasons} for name, reasons in rows.items()]
        click.echo(json.dumps({"recipe": prepared.recipe.name, "targets": document}, indent=2))
    else:
        for name, reasons in rows.items():
            click.echo(f"{name}: {'a rebuild would differ' if reasons else 'as it would be built now'}")
            for reason in reasons:
                click.echo(f"  {reason}")
    return 2 if detailed_exitcode and drifted else 0


def _built(prepared: Prepared, ref: str | None, out: Path, plain_http: bool) -> dict[str, Manifest]:
    """Target -> the manifest of what there is."""
    if ref and reference.is_reference(ref):
        where = reference.parse(ref)
        version = open_version(places.reading(where, out, plain_http=plain_http), where)
        return {each.manifest.target.name: each.manifest for each in version.targets}
    folder = Path(ref) if ref else out / prepared.recipe.name
    names = [name for name in prepared.plan.targets if (folder / name / "manifest.json").is_file()]
    return {name: load(folder / name)[0] for name in names}


def _reasons(prepared: Prepared, name: str, manifest: Manifest) -> list[str]:
    """What is asked for now and was not then; empty when the build keys are equal."""
    keys = prepared.plan.targets[name]
    if build_key(prepared.job, name, keys) == manifest.build_key:
        return []
    found = _changes("recipe", thaw(manifest.recipe), thaw(resolved_recipe(prepared.job, name)))
    sources = {"model": prepared.job.sources.model, **prepared.job.sources.data}
    then = {source.name: {file.path: file.digest for file in source.files} for source in manifest.sources}
    now = {role: {file.path: file.digest for file in source.files} for role, source in sources.items()}
    for role in sorted({*then, *now}):
        found += _changes(f"source {role}", then.get(role, {}), now.get(role, {}))
    planned = {step.name: step for step in prepared.plan.chain(keys["engine"])}
    recorded = {stage.id: stage for stage in manifest.stages}
    for step in sorted({*planned, *recorded}):
        if step not in planned or step not in recorded:
            found.append(f"step {step}: {'new' if step in planned else 'gone'}")
            continue
        new, old = planned[step], recorded[step]
        if new.key != old.key:
            before = {"stage": old.stage, "version": old.version, "tools": dict(old.tools)}
            after = {"stage": new.stage.name, "version": new.stage.version, "tools": dict(new.key_text["tools"])}
            found += _changes(f"step {step}", before, after) or [f"step {step}: its inputs or options differ"]
    return found or ["the golden inputs would differ"]


def _changes(what: str, before: Any, after: Any) -> list[str]:
    pairs = differences(flat(before), flat(after))
    return [f"{what}: {name} {short(old)} -> {short(new)}" for name, (old, new) in pairs]
