"""Prove an artifact where it runs: the golden inputs through its own runtime, judged by the manifest's gates.

A proof is a parity attestation. It takes the place of one that is deferred or that came from golden inputs too; where
the build judged the engine on held-out data, which says more, it is written beside it as `parity-golden.json`.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pipeline
from pipeline import hardware
from pipeline.artifact import attest
from pipeline.artifact.attest import ParityResult
from pipeline.artifact.manifest import Manifest
from pipeline.artifact.verify import Report, require, verify
from pipeline.errors import BY_EXIT_CODE, StageError
from pipeline.frozen import frozen
from pipeline.parity import gates

CHILD = (sys.executable, "-P", "-m", "pipeline.artifact.run_golden")
"""-P: an artifact's folder that is the working directory must not be able to bring Python modules of its own."""
TAIL_LINES = 15


@frozen
class Proof:
    """A verified artifact and how it did on this machine."""

    report: Report
    result: ParityResult
    verdicts: tuple[gates.Verdict, ...]
    attestation: Path | None
    benchmark: Path | None = None
    """What the golden inputs took here, as an attestation."""


def verify_run(path: Path, *, write: bool = False, child: Sequence[str] = CHILD) -> Proof:
    """Verify the artifact at `path`, then `prove` it. Raises VerificationError, and then nothing was run."""
    return prove(verify(path), write=write, child=child)


def prove(report: Report, *, write: bool = False, child: Sequence[str] = CHILD) -> Proof:
    """Run the golden inputs of a verified artifact on this machine and judge them by the manifest's gates.

    A gate that fails is told in the result, not raised. `write` adds the parity attestation. Raises UnavailableError
    when the runtime or the hardware is not here, StageError when the engine fails or crashes, VerificationError when
    the artifact carries no golden inputs or is not what its manifest says.
    """
    require(report)
    assert report.manifest is not None and report.artifact_id is not None
    path = report.path
    found_here, timing = _run(path.resolve(), child)
    result, verdicts = _judge(report.manifest, found_here)
    place = benchmark = None
    if write:
        found = attest.parity(result, report.manifest.gates, report.manifest.build_key)
        said = attest.statement(found.predicate_type, report.artifact_id, found.predicate, name=report.manifest.name)
        try:
            place = attest.write_attestation(path, _name(path, report.artifact_id), said)
            if timing:
                took = attest.benchmark(timing, result.host)
                about = attest.statement(
                    took.predicate_type, report.artifact_id, took.predicate, name=report.manifest.name
                )
                benchmark = attest.write_attestation(path, "benchmark", about)
        except OSError as error:
            raise StageError(
                f"the attestation cannot be written: {error.filename}: {error.strerror}",
                hint="make the artifact's folder writable, or run without --attest",
            ) from error
    return Proof(report, result, verdicts, place, benchmark)


def _name(path: Path, identity: str) -> str:
    """Which attestation to write: held-out verdicts are kept."""
    found = attest.read_attestation(path, "parity", identity)
    held_out = found is not None and attest.judged(found["predicate"]) and found["predicate"].get("inputs") != "golden"
    return "parity-golden" if held_out else "parity"


def _judge(manifest: Manifest, report: dict[str, Any]) -> tuple[ParityResult, tuple[gates.Verdict, ...]]:
    """The verdict on a golden report. Metrics that so few inputs cannot show are skipped, and said to be."""
    metrics: dict[str, float | None] = report["metrics"]
    limits = {name: None if text is None else float(text) for name, text in manifest.gates.items()}
    interface = manifest.interface
    verdicts = tuple(
        verdict
        for verdict in gates.evaluate(metrics, interface.kind, manifest.precision, limits, interface.task)
        if verdict.metric in limits and verdict.metric in metrics
    )
    passed = tuple(verdict.metric for verdict in verdicts if verdict.outcome is gates.Outcome.PASSED)
    failed = tuple(verdict.metric for verdict in verdicts if verdict.outcome is gates.Outcome.FAILED)
    skipped = tuple(name for name, limit in limits.items() if limit is not None and name not in metrics)
    reason = ""
    if not passed and not failed:
        reason = "the golden inputs judge none of the gates" if skipped else "every gate is switched off"
    elif failed:
        reason = "; ".join(gates.explain(verdict) for verdict in verdicts if verdict.metric in failed)
    here = hardware.probe()
    result = ParityResult(
        verdict="failed" if failed else "passed" if passed else "deferred",
        metrics=metrics,
        passed=passed,
        failed=failed,
        skipped=skipped,
        reason=reason,
        samples=report["samples"],
        inputs="golden",
        worst=report["worst"],
        host={
            "os": here.os,
            "arch": here.arch,
            "isa": list(here.isa),
            "devices": [device.name for device in here.devices],
            "enginewright": pipeline.__version__,
        },
    )
    return result, verdicts


def _run(artifact: Path, child: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the child; its report and what it took, or its error raised here."""
    with tempfile.TemporaryDirectory(prefix="enginewright-") as scratch:
        result, log = Path(scratch) / "result.json", Path(scratch) / "log"
        command = [*child, str(artifact), str(result)]
        root = str(Path(pipeline.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
        with log.open("wb") as stream:
            code = subprocess.run(
                command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=environment, check=False
            ).returncode
        found = _read(result)
        if error := found.get("error"):
            raise BY_EXIT_CODE.get(error["exit_code"], StageError)(error["message"], hint=error["hint"])
        if code == 0 and "report" in found:
            return found["report"], found.get("timing") or {}
        tail = "\n".join(log.read_text("utf-8", "replace").splitlines()[-TAIL_LINES:])
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    raise StageError(
        f"the engine's process {how} while it ran the golden inputs of {artifact}" + (f":\n{tail}" if tail else ""),
        hint=f"repeat it with: {shlex.join([*child, str(artifact), '/dev/stdout'])}",
    )


def _read(result: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(result.read_bytes())
    except (OSError, ValueError):
        return {}
    return found
