"""What came out of a build: verdicts by target, as text, JSON and GitHub's summary."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.artifact.attest import ParityResult
from pipeline.artifact.package import Assembled
from pipeline.cli.console import megabytes, table
from pipeline.cli.prepare import Prepared
from pipeline.errors import GateError
from pipeline.frozen import frozen
from pipeline.parity import gates
from pipeline.parity.gates import Outcome, Verdict
from pipeline.recipe import Recipe, TargetOptions
from pipeline.store import Entry
from pipeline.targets import Job

SHOWN = {
    "decoder": ("kld_mean", "top1", "perplexity_ratio", "greedy_equal"),
    "seq2seq": ("kld_mean", "top1", "perplexity_ratio", "greedy_equal"),
    "encoder": ("cosine_mean", "cosine_min", "max_abs_error", "spearman"),
}
"""The columns of the table of results."""
STAND_INS = {"graph": "its graph on another runtime", "checkpoint": "its checkpoint, dequantized in torch"}
"""`parity.<name>` judges what an engine was made from, where the engine itself may not run."""


@frozen
class StandIn:
    """What was judged beside an engine that may not run here, or in its place."""

    what: str
    """Of `STAND_INS`."""
    result: ParityResult


@frozen
class Judged:
    """A target, measured and judged."""

    target: str
    precision: str
    kind: str
    size_bytes: int
    metrics: Mapping[str, float | None]
    worst: Mapping[str, Any]
    verdicts: tuple[Verdict, ...]
    result: ParityResult
    stand_in: StandIn | None = None

    @property
    def outcome(self) -> Outcome:
        """One word for all the gates. An engine whose stand-in failed them has failed, whether it ran or not."""
        return Outcome.FAILED if self.stand_in and self.stand_in.result.failed else gates.overall(self.verdicts)


def judge(prepared: Prepared, results: Mapping[str, Entry]) -> list[Judged]:
    """Hold every target's reports against the gates of its precision, with the recipe's overrides."""
    return [_judge(prepared, name, results) for name in prepared.plan.targets]


def _judge(prepared: Prepared, name: str, results: Mapping[str, Entry]) -> Judged:
    keys, job = prepared.plan.targets[name], prepared.job
    engine = results[keys["engine"]]
    precision = str(_json(engine.out / "engine.json")["precision"])
    report: dict[str, Any] = {"metrics": {}, "worst": {}, "samples": 0}
    target = prepared.recipe.targets[name]
    verdicts: tuple[Verdict, ...] = ()
    if "parity" in keys:
        report = _json(results[keys["parity"]].out / "report.json")
    if "reference" in keys:  # without a parity step nothing ran here, and every gate is deferred
        measured = report["metrics"] if "parity" in keys else None
        verdicts = gates.evaluate(measured, job.kind, precision, target.gates, job.task)
    stand_in = None
    if what := next((each for each in STAND_INS if f"parity.{each}" in keys), ""):
        found = _json(results[keys[f"parity.{what}"]].out / "report.json")
        judged = gates.evaluate(found["metrics"], job.kind, precision, target.gates, job.task)
        stand_in = StandIn(what, _result(found, judged))
    if "parity.unquantized" in keys:
        before = _json(results[keys["parity.unquantized"]].out / "report.json")
        unquantized = str(_json(results[keys["unquantized"]].out / "engine.json")["precision"])
        _check_structure(name, unquantized, before["metrics"], job, target)
    if "parity.f32" in keys and gates.overall(verdicts) is not Outcome.FAILED:
        plain = _json(results[keys["parity.f32"]].out / "report.json")
        _check_weights(name, gates.evaluate(plain["metrics"], job.kind, precision, target.gates, job.task))
    result = _result(report, verdicts, _why_not(keys, verdicts))
    metrics, worst = report["metrics"], report["worst"]
    if stand_in and "parity" not in keys:
        metrics, worst = found["metrics"], found["worst"]
    return Judged(name, precision, job.kind, engine.size_bytes, metrics, worst, verdicts, result, stand_in)


def _result(report: Mapping[str, Any], verdicts: tuple[Verdict, ...], reason: str = "") -> ParityResult:
    """A report and its verdicts as an attestation says them."""
    by = {o: tuple(v.metric for v in verdicts if v.outcome is o) for o in Outcome}
    words = {Outcome.PASSED: "passed", Outcome.FAILED: "failed"}
    failed = "; ".join(gates.explain(v) for v in verdicts if v.outcome is Outcome.FAILED)
    return ParityResult(
        verdict=words.get(gates.overall(verdicts), "deferred"),  # type: ignore[arg-type]
        metrics={k: v for k, v in report["metrics"].items() if v is not None},
        passed=by[Outcome.PASSED],
        failed=by[Outcome.FAILED],
        skipped=by[Outcome.OFF],
        reason=reason or failed,
        samples=int(report["samples"]),
        worst=report["worst"],
    )


def _why_not(keys: Mapping[str, str], verdicts: tuple[Verdict, ...]) -> str:
    """Why nothing was judged; empty where it was."""
    if "parity" in keys:
        return ""
    if "parity.f32" in keys:
        return "this machine cannot run the engine at its precision; in fp32 its weights pass"
    return "this machine cannot run the engine" if verdicts else "no parity step"


def _check_structure(name: str, precision: str, metrics: Mapping[str, float], job: Job, target: TargetOptions) -> None:
    """The engine before quantization, at the gates of its own precision: an export bug must not pass as its loss."""
    verdicts = gates.evaluate(metrics, job.kind, precision, target.unquantized_gates, job.task)
    if gates.overall(verdicts) is Outcome.FAILED:
        failed = [gates.explain(v) for v in verdicts if v.outcome is Outcome.FAILED]
        raise GateError(
            f"{name}: the engine differs from the checkpoint before any quantization; nothing was published:\n"
            + "\n".join(failed),
            hint="the export is at fault, or the model is numerically wild: try another `exporter`, "
            "or set `unquantized_gates` of the target",
        )


def _check_weights(name: str, verdicts: tuple[Verdict, ...]) -> None:
    """The same engine executed in fp32: what its weights lost must not be mistaken for what the execution loses."""
    if gates.overall(verdicts) is Outcome.FAILED:
        failed = [gates.explain(v) for v in verdicts if v.outcome is Outcome.FAILED]
        raise GateError(
            f"{name}: the engine's weights fail its gates when they are executed in fp32; nothing was published:\n"
            + "\n".join(failed),
            hint="quantize less: a smaller group, int8 for more layers, or calibration; or set `gates` of the target",
        )


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def why(judged: Judged) -> list[str]:
    """Every failed gate with value and threshold, and where it was worst."""
    lines = [f"{judged.target}: {gates.explain(v)}" for v in judged.verdicts if v.outcome is Outcome.FAILED]
    if judged.stand_in and judged.stand_in.result.failed:
        said, what = judged.stand_in.result.reason, STAND_INS[judged.stand_in.what]
        lines += [f"{judged.target}: {what}: {line}" for line in said.split("; ")]
    if judged.worst:
        lines.append(f"{judged.target}: worst sample: {json.dumps(judged.worst, ensure_ascii=False)[:400]}")
    return lines


def text(judged: Sequence[Judged], made: Mapping[str, Assembled]) -> str:
    """The table of results for a person."""
    shown = SHOWN[judged[0].kind] if judged else ()
    rows = [
        (
            each.target,
            each.precision,
            megabytes(each.size_bytes),
            *(_number(each.metrics.get(metric)) for metric in shown),
            _gates(each),
            _place(made.get(each.target)),
        )
        for each in judged
    ]
    lines = [table(("TARGET", "PRECISION", "SIZE", *(m.upper() for m in shown), "GATES", "ARTIFACT"), rows)]
    lines += [f"{name}  {each.artifact_id}" for name, each in made.items()]
    return "\n".join(lines)


def _gates(judged: Judged) -> str:
    """`8/8 passed`; of an engine with a stand-in, that one's gates as well: `graph 6/6 passed, engine 0/6 deferred`."""
    own = f"{sum(v.passed for v in judged.verdicts)}/{len(judged.verdicts)} {gates.overall(judged.verdicts)}"
    if judged.stand_in is None:
        return own
    what, result = judged.stand_in.what, judged.stand_in.result
    return f"{what} {len(result.passed)}/{len(result.passed) + len(result.failed)} {result.verdict}, engine {own}"


def _place(assembled: Assembled | None) -> str:
    return "-" if assembled is None else f"{assembled.path}{'' if assembled.changed else ' (unchanged)'}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def document(recipe: Recipe, judged: Sequence[Judged], made: Mapping[str, Assembled]) -> dict[str, Any]:
    """The same for programs."""
    return {
        "recipe": recipe.name,
        "version": recipe.version,
        "targets": [
            {
                "target": each.target,
                "precision": each.precision,
                "size_bytes": each.size_bytes,
                "outcome": str(each.outcome),
                "metrics": dict(each.metrics),
                "worst": dict(each.worst),
                "gates": [
                    {
                        "metric": v.metric,
                        "value": v.value,
                        "threshold": v.threshold,
                        "direction": v.direction,
                        "outcome": str(v.outcome),
                    }
                    for v in each.verdicts
                ],
                **({each.stand_in.what: _brief(each.stand_in.result)} if each.stand_in else {}),
                "artifact": str(made[each.target].path) if each.target in made else None,
                "artifact_id": made[each.target].artifact_id if each.target in made else None,
                "changed": made[each.target].changed if each.target in made else False,
            }
            for each in judged
        ],
    }


def _brief(result: ParityResult) -> dict[str, Any]:
    return {"outcome": result.verdict, "passed": list(result.passed), "failed": list(result.failed)}


def tell_github(judged: Sequence[Judged], made: Mapping[str, Assembled]) -> None:
    """Append to GITHUB_STEP_SUMMARY and GITHUB_OUTPUT where a workflow has set them."""
    shown = SHOWN[judged[0].kind] if judged else ()
    head = ("target", "precision", "size", *shown, "gates")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for each in judged:
        values = [_number(each.metrics.get(metric)) for metric in shown]
        cells = [each.target, each.precision, megabytes(each.size_bytes), *values, str(each.outcome)]
        lines.append(f"| {' | '.join(cells)} |")
    _append("GITHUB_STEP_SUMMARY", lines)
    _append(
        "GITHUB_OUTPUT",
        [f"artifact_id_{n}={a.artifact_id}\nartifact_{n}={a.path}" for n, a in made.items()],
    )


def _append(variable: str, lines: Sequence[str]) -> None:
    """Add lines to the file that an environment variable names. The artifacts are there: that it fails is a note."""
    path = os.environ.get(variable)
    if not path or not lines:
        return
    try:
        with Path(path).open("a", encoding="utf-8") as handle:
            handle.write("\n".join(lines) + "\n")
    except OSError as error:
        click.echo(f"note: {variable} ({path}) cannot be written: {error.strerror}", err=True)
