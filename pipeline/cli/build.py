"""`enginewright build`: recipe -> plan -> results -> gates -> artifacts."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli import options, outcome, preflight
from pipeline.cli.cache import size
from pipeline.cli.console import megabytes, opened
from pipeline.cli.errors import report
from pipeline.cli.options import FOLDER
from pipeline.cli.prepare import Prepared, prepare
from pipeline.cli.publish import publish
from pipeline.cli.running import run
from pipeline.errors import GateError, RecipeError
from pipeline.hardware import probe
from pipeline.parity import gates
from pipeline.run import budget
from pipeline.run.lean import drop
from pipeline.run.linked import note_links
from pipeline.run.status import status
from pipeline.store import open_store

if TYPE_CHECKING:
    from pipeline.cli.best_of import Choice
    from pipeline.shared import Shared


@click.command()
@options.recipe
@options.overrides
@click.option("--target", "only", multiple=True, metavar="NAME", help="Build only this target (may be repeated).")
@click.option("--plan", "plan_only", is_flag=True, help="Show what would run and why; run nothing.")
@click.option("--detailed-exitcode", is_flag=True, help="With --plan: 0 nothing to do, 2 work to do, 1 error.")
@click.option("--locked", is_flag=True, help="Fail if a source differs from the recipe's lock file.")
@options.offline
@click.option("--update", is_flag=True, help="Ask the hub again which commit a branch or tag means.")
@options.cache
@click.option("--out", type=FOLDER, default=Path("artifacts"), show_default=True, help="Where artifacts go.")
@click.option("--copy", is_flag=True, help="Copy files into artifacts instead of linking them to the store.")
@click.option("--lean", is_flag=True, help="At the end drop intermediate results that no artifact holds.")
@options.jobs
@click.option(
    "--on", "where", metavar="PLACE", default="local", help="local, ray (here or $RAY_ADDRESS), ray://HOST:PORT."
)
@options.memory
@click.option(
    "--shared",
    "url",
    metavar="URL",
    envvar="ENGINEWRIGHT_SHARED",
    help="A store in common: s3://, gs://, file://, oci://.",
)
@click.option("--shared-read-only", is_flag=True, envvar="ENGINEWRIGHT_SHARED_READ_ONLY", help="Put nothing there.")
@click.option("--best-of", "choosing", is_flag=True, help="Keep the fastest passing target of each hardware alone.")
@options.form
@options.events
@click.option("--junit", type=FOLDER, help="Write the gates as a JUnit XML file.")
@options.quiet
def build(
    recipe: Path,
    overrides: Sequence[str],
    only: Sequence[str],
    plan_only: bool,
    detailed_exitcode: bool,
    locked: bool,
    offline: bool,
    update: bool,
    root: Path | None,
    out: Path,
    copy: bool,
    lean: bool,
    jobs: int | None,
    where: str,
    memory: str | None,
    url: str | None,
    shared_read_only: bool,
    choosing: bool,
    form: str,
    events: str | None,
    junit: Path | None,
    quiet: bool,
) -> int:
    """Build every target of RECIPE: export, quantize, compile, prove, package.

    Exit code 0 means that every gate passed and every artifact is complete.
    """
    started = datetime.now(UTC)
    for option, file in (("--events", events), ("--junit", junit)):
        if file and file != "-":
            preflight.report_file(Path(file), option)
    memory_bytes = size(memory) if memory else None
    if where not in ("local", "ray") and not where.startswith("ray://"):
        raise RecipeError(f"--on cannot be {where!r}", hint="write local, ray or ray://HOST:PORT")
    store = open_store(root)
    try:
        pinning = {"locked": locked, "offline": offline, "update": update, "write_lock": not plan_only}
        prepared = prepare(recipe, store, overrides=overrides, only=only, **pinning)
        if prepared.job.sources.note:
            _note(prepared.job.sources.note)
        last = store.last(_memory(prepared))
        states = list(status(prepared.plan, store, last))
        shared = _shared(url, read_only=shared_read_only, offline=offline)
        known = shared.look_up(prepared.plan.by_key(), _note) if shared else {}
        there = {state.step.key: known[state.step.key] for state in states if not state.hit and state.step.key in known}
    except Exception as error:
        if plan_only and detailed_exitcode:  # 1 is what --detailed-exitcode calls an error, of any kind
            report(error)
            return 1
        raise
    most = (memory_bytes or probe().memory_bytes) if where == "local" else 0  # a cluster says itself what it has
    if plan_only:
        from pipeline.cli import plan_table

        plan_table.show(prepared, states, there, store, most, form)
        runs = (state.step for state in states if not state.hit and state.step.key not in there)
        if misfit := preflight.too_large(runs, most):
            if not detailed_exitcode:
                raise misfit
            report(misfit)
            return 1
        return 2 if detailed_exitcode and not all(state.hit for state in states) else 0
    with opened(events) as stream, store.using(prepared.plan.by_key()):
        if running := [each.step for each in states if not each.hit and each.step.key not in there]:
            preflight.check(prepared, running, store, most, out)
        limits = budget.of_host(probe(), jobs, memory_bytes, os.environ.get("OMP_NUM_THREADS", ""))
        silent = quiet or form == "json"
        results, costs = run(prepared, store, states, limits, where=where, shared=shared, stream=stream, quiet=silent)
        store.remember(_memory(prepared), _keys(prepared))
        judged = outcome.judge(prepared, results)
        if junit:
            from pipeline.cli.junit import write_junit

            write_junit(junit, prepared.recipe.name, judged)
        choices: list[Choice] = []
        if choosing:
            from pipeline.cli.best_of import choose

            choices = choose(prepared, judged, results)
        if any(choice.kept for choice in choices):  # what failed its gates has lost, and fails nothing
            kept = {choice.target for choice in choices if choice.kept}
            judged = [each for each in judged if each.target in kept]
        failed = [each for each in judged if each.outcome is gates.Outcome.FAILED]
        made = {} if failed else publish(prepared, results, judged, out, started, costs, copy)
        note_links(store, results.values())
        document = outcome.document(prepared.recipe, judged, made)
        if choosing:
            document["choices"] = [asdict(choice) for choice in choices]
        if stream:
            stream.write(json.dumps({"event": "result", **document}) + "\n")
    if lean and not failed:
        dropped = drop(prepared.plan, store)
        if not silent:
            _note(f"--lean dropped {megabytes(dropped)} of intermediate results")
    if form == "json":
        click.echo(json.dumps(document, indent=2))
    else:
        click.echo(outcome.text(judged, made))
        if choices:
            from pipeline.cli.best_of import text

            click.echo(text(choices))
    outcome.tell_github(judged, made)
    if failed:
        raise GateError(
            f"{len(failed)} of {len(judged)} targets failed their gates; nothing was published:\n"
            + "\n".join(line for each in failed for line in outcome.why(each)),
            hint="the engines stay in the store for inspection:\n"
            + "\n".join(str(store.path(prepared.plan.targets[each.target]["engine"]) / "out") for each in failed),
        )
    return 0


def _shared(url: str | None, *, read_only: bool, offline: bool) -> Shared | None:
    """The store behind the store, if one is named."""
    if not url:
        return None
    if offline and not url.startswith("file://"):
        click.echo("note: --offline: the shared store is not asked", err=True)
        return None
    from pipeline.shared import open_shared

    return open_shared(url, read_only=read_only)


def _note(text: str) -> None:
    click.echo(f"note: {text}", err=True)


def _memory(prepared: Prepared) -> str:
    """Under which name the store remembers this recipe's keys."""
    return prepared.recipe.name


def _keys(prepared: Prepared) -> dict[str, str]:
    return {f"{t}/{step}": key for t, keys in prepared.plan.targets.items() for step, key in keys.items()}
