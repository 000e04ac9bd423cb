"""The end of a build: every target's artifact is assembled and put in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.artifact import attest, facts
from pipeline.artifact.manifest import ManifestFacts
from pipeline.artifact.package import Assembled, assemble, check_replaceable
from pipeline.cli import outcome
from pipeline.cli.prepare import Prepared
from pipeline.run.once import Event
from pipeline.store import Entry
from pipeline.trust.sbom import sbom


def publish(
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
