"""`enginewright build`: recipe -> plan -> results -> gates -> artifacts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import click

from pipeline import __version__
from pipeline.artifact import attest, facts
from pipeline.artifact.manifest import ManifestFacts
from pipeline.artifact.package import Assembled, assemble, check_replaceable
from pipeline.cli import best_of, outcome, preflight
from pipeline.cli.cache import size
from pipeline.cli.console import listening, megabytes, opened, table
from pipeline.cli.errors import report
from pipeline.cli.prepare import Prepared, prepare
from pipeline.errors import GateError, RecipeError, StageError
from pipeline.hardware import probe
from pipeline.parity import gates
from pipeline.run import budget
from pipeline.run.budget import Budget
from pipeline.run.local import Runner
from pipeline.run.once import Event
from pipeline.run.status import Status, status
from pipeline.store import Entry, Store, open_store
from pipeline.trust.sbom import sbom

FOLDER = click.Path(path_type=Path)
FORMAT = click.Choice(["text", "json"])


@click.command()
@click.argument("recipe", type=FOLDER)
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field of the recipe.")
@click.option("--target", "only", multiple=True, metavar="NAME", help="Build only this target (may be repeated).")
@click.option("--plan", "plan_only", is_flag=True, help="Show what would run and why; run nothing.")
@click.option("--detailed-exitcode", is_flag=True, help="With --plan: 0 nothing to do, 2 work to do, 1 error.")
@click.option("--locked", is_flag=True, help="Fail if a source differs from the recipe's lock file.")
@click.option("--offline", is_flag=True, help="Use no network; sources must be local or fetched before.")
@click.option("--update", is_flag=True, help="Ask the hub again which commit a branch or tag means.")
@click.option("--cache", "root", type=FOLDER, help="The store. Default: $ENGINEWRIGHT_CACHE or ~/.cache/enginewright.")
@click.option("--out", type=FOLDER, default=Path("artifacts"), show_default=True, help="Where artifacts go.")
@click.option("--copy", is_flag=True, help="Copy files into artifacts instead of linking them to the store.")
@click.option("--jobs", "-j", type=click.IntRange(1), help="Steps that run side by side. Default: as many as cores.")
@click.option(
    "--on", "where", metavar="PLACE", default="local", help="local, ray (here or $RAY_ADDRESS), ray://HOST:PORT."
)
@click.option("--memory", metavar="SIZE", help="Memory for the steps, e.g. 12GB. Default: 90% of what is free.")
@click.option("--best-of", "choosing", is_flag=True, help="Keep the fastest passing target of each hardware alone.")
@click.option("--format", "form", type=FORMAT, default="text", help="json: one document on standard output.")
@click.option("--events", metavar="FILE", help="Write NDJSON events to FILE (`-`: standard error).")
@click.option("--junit", type=FOLDER, help="Write the gates as a JUnit XML file.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
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
    jobs: int | None,
    where: str,
    memory: str | None,
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
            click.echo(f"note: {prepared.job.sources.note}", err=True)
        last = store.last(_memory(prepared))
        states = list(status(prepared.plan, store, last))
    except Exception as error:
        if plan_only and detailed_exitcode:  # 1 is what --detailed-exitcode calls an error, of any kind
            report(error)
            return 1
        raise
    most = (memory_bytes or probe().memory_bytes) if where == "local" else 0  # a cluster says itself what it has
    if plan_only:
        _show_plan(prepared, states, store, most, form)
        if misfit := preflight.too_large((state.step for state in states if not state.hit), most):
            if not detailed_exitcode:
                raise misfit
            report(misfit)
            return 1
        return 2 if detailed_exitcode and not all(state.hit for state in states) else 0
    costs: dict[str, Event] = {}
    with opened(events) as stream, store.using(prepared.plan.by_key()):
        missing = [state.step for state in states if not state.hit]
        if missing:
            preflight.check(prepared, missing, store, most, out)
        limits = budget.of_host(probe(), jobs, memory_bytes, os.environ.get("OMP_NUM_THREADS", ""))
        results = _run(
            prepared, store, [step.label for step in missing], costs, stream, limits, where, quiet or form == "json"
        )
        store.remember(_memory(prepared), _keys(prepared))
        judged = outcome.judge(prepared, results)
        if junit:
            outcome.write_junit(junit, prepared.recipe.name, judged)
        choices = best_of.choose(prepared, judged, results) if choosing else []
        if any(choice.kept for choice in choices):  # what failed its gates has lost, and fails nothing
            kept = {choice.target for choice in choices if choice.kept}
            judged = [each for each in judged if each.target in kept]
        failed = [each for each in judged if each.outcome is gates.Outcome.FAILED]
        made = {} if failed else _publish(prepared, results, judged, out, started, costs, copy)
        document = outcome.document(prepared.recipe, judged, made)
        if choosing:
            document["choices"] = [asdict(choice) for choice in choices]
        if stream:
            stream.write(json.dumps({"event": "result", **document}) + "\n")
    if form == "json":
        click.echo(json.dumps(document, indent=2))
    else:
        click.echo(outcome.text(judged, made))
        if choices:
            click.echo(best_of.text(choices))
    outcome.tell_github(judged, made)
    if failed:
        raise GateError(
            f"{len(failed)} of {len(judged)} targets failed their gates; nothing was published:\n"
            + "\n".join(line for each in failed for line in outcome.why(each)),
            hint="the engines stay in the store for inspection:\n"
            + "\n".join(str(store.path(prepared.plan.targets[each.target]["engine"]) / "out") for each in failed),
        )
    return 0


def _memory(prepared: Prepared) -> str:
    """Under which name the store remembers this recipe's keys."""
    return prepared.recipe.name


def _keys(prepared: Prepared) -> dict[str, str]:
    return {f"{t}/{step}": key for t, keys in prepared.plan.targets.items() for step, key in keys.items()}


def _run(
    prepared: Prepared,
    store: Store,
    missing: Sequence[str],
    costs: dict[str, Event],
    stream: IO[str] | None,
    limits: Budget,
    where: str,
    quiet: bool,
) -> dict[str, Entry]:
    with listening(missing, stream, quiet=quiet) as show:

        def listen(event: Event) -> None:
            if event["event"] in ("done", "hit"):
                costs[event["key"]] = event
            show(event)

        chains = prepared.recipe.toolchains
        try:
            if where == "local":
                return Runner(store, listen, chains, limits).run(prepared.plan)
            from pipeline.run.ray import RayRunner

            return RayRunner(store, listen, chains, limits, where.removesuffix("ray")).run(prepared.plan)
        except (RecipeError, StageError) as error:
            # A stage knows its inputs by role: `model`, `data.txt`. The user knows them by path.
            sources = {"model": prepared.job.sources.model, **prepared.job.sources.data}
            named = (f"{role} is {source.uri}" for role, source in sources.items())
            error.hint = f"{error.hint}\nwhere {', '.join(named)}".lstrip()
            raise


def _publish(
    prepared: Prepared,
    results: Mapping[str, Entry],
    judged: Sequence[outcome.Judged],
    out: Path,
    started: datetime,
    costs: Mapping[str, Event],
    copy: bool,
) -> dict[str, Assembled]:
    """Assemble every target's artifact; each swap is atomic, and none begins before all gates have passed."""
    made = {}
    for each in judged:
        check_replaceable(out / prepared.recipe.name / each.target)
    for each in judged:
        keys, hardware = prepared.plan.targets[each.target], prepared.hardware[each.target]
        about = facts.manifest_facts(prepared.job, each.target, prepared.plan, results, each.verdicts, hardware)
        stamp = {"started": started.isoformat(), "finished": datetime.now(UTC).isoformat()}
        steps = [
            attest.StepRun(
                name=step.name,
                key=step.key,
                cached=costs[step.key]["event"] == "hit",
                output_bytes=results[step.key].size_bytes,
                **{n: results[step.key].run.get(n) for n in ("wall_s", "cpu_s", "peak_rss_bytes")},
            )
            for step in prepared.plan.steps
            if each.target in step.targets
        ]
        made[each.target] = assemble(
            results[keys["engine"]].out,
            golden_dir=results[keys["golden"]].out if "golden" in keys else None,
            manifest_facts=about,
            destination=out / prepared.recipe.name / each.target,
            link="copy" if copy else "auto",
            license_file=facts.license_file(results, keys),
            attestations={
                "provenance": attest.provenance(
                    about, **stamp, steps=steps, host=_host(hardware), versions={"enginewright": __version__}
                ),
                "parity": attest.parity(each.result, about.gates, about.build_key),
                "sbom": sbom(about),
                **_stand_in(each.stand_in, about),
            },
        )
    return made


def _stand_in(judged: outcome.StandIn | None, about: ManifestFacts) -> dict[str, attest.Attestation]:
    """`parity-graph` or `parity-checkpoint`: of what was judged in the engine's place, where something was."""
    if judged is None:
        return {}
    return {f"parity-{judged.what}": attest.parity(judged.result, about.gates, about.build_key)}


def _host(hardware: Any) -> dict[str, Any]:
    return {"os": hardware.os, "arch": hardware.arch, "isa": list(hardware.isa), "cores": os.cpu_count()}


def _show_plan(prepared: Prepared, states: Sequence[Status], store: Store, most: int, form: str) -> None:
    rows = [
        {
            "step": state.step.label,
            "stage": state.step.stage.name,
            "key": state.step.key,
            "targets": list(state.step.targets),
            "state": "hit" if state.hit else "miss",
            "reason": state.reason,
            "size_bytes": state.size_bytes,
            "memory_need_bytes": state.step.memory_bytes,
            "toolchain": state.step.stage.toolchain,
            "scope": state.step.stage.scope,
        }
        for state in states
    ]
    if form == "json":
        document = {"recipe": prepared.recipe.name, "store": str(store.root), "memory_bytes": most, "steps": rows}
        click.echo(json.dumps(document, indent=2))
        return
    shown = [
        (
            row["step"],
            row["stage"],
            row["state"],
            megabytes(state.size_bytes) if state.hit else "",
            "" if state.hit else megabytes(state.step.memory_bytes),
            row["reason"],
        )
        for row, state in zip(rows, states, strict=True)
    ]
    click.echo(table(("STEP", "STAGE", "STATE", "SIZE", "MEMORY", "REASON"), shown))
    missing = [state for state in states if not state.hit]
    click.echo(
        f"\n{len(missing)} of {len(states)} steps to run, {len(states) - len(missing)} in the store at {store.root}"
    )
    if missing:
        need = max(state.step.memory_bytes for state in missing)
        click.echo(f"memory: up to {megabytes(need)} a step" + (f", of {megabytes(most)} here" if most else ""))
