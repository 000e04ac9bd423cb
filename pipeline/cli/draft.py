"""`enginewright draft`: the engines of a recipe without proof, for a first look at size and speed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from pipeline.artifact import draft as drafts
from pipeline.cli import options, preflight
from pipeline.cli.cache import size
from pipeline.cli.console import megabytes, opened, table
from pipeline.cli.options import FOLDER
from pipeline.cli.prepare import Prepared, prepare
from pipeline.cli.running import run
from pipeline.hardware import probe
from pipeline.plan import Plan
from pipeline.run import budget
from pipeline.run.lean import drop
from pipeline.run.linked import note_links
from pipeline.run.status import status
from pipeline.store import open_store


@click.command()
@options.recipe
@options.overrides
@click.option("--target", "only", multiple=True, metavar="NAME", help="Make only this target (may be repeated).")
@options.offline
@options.cache
@click.option("--out", type=FOLDER, default=Path("drafts"), show_default=True, help="Where drafts go.")
@click.option("--copy", is_flag=True, help="Copy files into drafts instead of linking them to the store.")
@click.option("--lean", is_flag=True, help="At the end drop intermediate results that no engine holds.")
@options.jobs
@options.memory
@options.form
@options.events
@options.quiet
def draft(
    recipe: Path,
    overrides: Sequence[str],
    only: Sequence[str],
    offline: bool,
    root: Path | None,
    out: Path,
    copy: bool,
    lean: bool,
    jobs: int | None,
    memory: str | None,
    form: str,
    events: str | None,
    quiet: bool,
) -> int:
    """Make the engine of every target of RECIPE, and nothing else.

    No reference runs and no gate judges, so a draft is no artifact. It has no manifest: `generate`, `serve` and `bench`
    try it, and what publishes refuses it. `build` proves the same engines and does not make them again.
    """
    if events and events != "-":
        preflight.report_file(Path(events), "--events")
    memory_bytes = size(memory) if memory else None
    store = open_store(root)
    whole = prepare(recipe, store, overrides=overrides, only=only, offline=offline, write_lock=True)
    prepared = replace(whole, plan=engines(whole.plan))
    places = {target: out / prepared.recipe.name / target for target in prepared.plan.targets}
    silent = quiet or form == "json"
    with opened(events) as stream, store.using(prepared.plan.by_key()):
        for place in places.values():
            preflight.writable(place, out, "draft")
            drafts.check_replaceable(place)
        states = list(status(prepared.plan, store, store.last(prepared.recipe.name)))
        missing = [state.step for state in states if not state.hit]
        for problem in preflight.problems(prepared, missing, store, memory_bytes or probe().memory_bytes):
            raise problem
        limits = budget.of_host(probe(), jobs, memory_bytes, os.environ.get("OMP_NUM_THREADS", ""))
        results, _ = run(prepared, store, states, limits, stream=stream, quiet=silent)
        rows = []
        for target, place in places.items():
            engine = results[prepared.plan.targets[target]["engine"]]
            drafts.put(engine.out, place, _said(prepared, target), "copy" if copy else "auto")
            precision = json.loads((engine.out / "engine.json").read_bytes())["precision"]
            rows.append({"target": target, "precision": precision, "size_bytes": engine.size_bytes, "path": str(place)})
        note_links(store, results.values())
    if lean:
        drop(prepared.plan, store)
    if form == "json":
        click.echo(json.dumps({"recipe": prepared.recipe.name, "proved": False, "targets": rows}, indent=2))
        return 0
    shown = [(row["target"], row["precision"], megabytes(row["size_bytes"]), row["path"]) for row in rows]
    click.echo(table(("TARGET", "PRECISION", "SIZE", "DRAFT"), shown))
    if not quiet:
        click.echo(f"note: nothing is proved: `build {recipe}` compares these engines with the model", err=True)
    return 0


def engines(plan: Plan) -> Plan:
    """The part of a plan that the engines rest on: without the reference, parity, and what only these read."""
    steps = plan.chain(*(keys["engine"] for keys in plan.targets.values()))
    kept = {step.key for step in steps}
    return Plan(steps, {t: {n: key for n, key in keys.items() if key in kept} for t, keys in plan.targets.items()})


def _said(prepared: Prepared, target: str) -> dict[str, object]:
    """Of what a draft is one."""
    recipe = prepared.recipe
    step = prepared.plan.targets[target]["engine"]
    return {"recipe": recipe.name, "target": target, "runtime": recipe.targets[target].runtime, "step": step}
