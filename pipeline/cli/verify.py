"""`enginewright verify`: an artifact against its manifest, and on request against the reference on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.artifact.verify import Report, examine, require
from pipeline.cli.console import megabytes
from pipeline.errors import GateError, RecipeError

if TYPE_CHECKING:
    from pipeline.artifact.prove import Proof


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--run", is_flag=True, help="Run the golden inputs on this machine and judge them by the gates.")
@click.option("--attest", is_flag=True, help="With --run: write the result into the artifact's .attest/ folder.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", help="json: one document.")
def verify(path: Path, run: bool, attest: bool, form: str) -> None:
    """Check the artifact in the folder PATH: every file's size and digest, nothing missing, nothing added.

    Exit codes: 0 it is what its manifest says (and with --run every gate passed), 4 a gate failed, 5 the runtime or the
    hardware is not here, 6 it is not what its manifest says.
    """
    if attest and not run:
        raise RecipeError("--attest writes down what --run found", hint="add --run")
    report = examine(path)
    if not report.ok:
        if form == "json":
            click.echo(json.dumps(document(report, None), indent=2))
        require(report)
    proof = None
    if run:
        from pipeline.artifact.prove import prove

        proof = prove(report, write=attest)
    click.echo(json.dumps(document(report, proof), indent=2) if form == "json" else text(report, proof))
    if proof and proof.result.failed:
        raise GateError(
            f"{path} does not pass on this machine: {proof.result.reason}",
            hint="`enginewright inspect` shows what the build measured: this machine or its runtime differs",
        )
    if proof and proof.result.skipped and not proof.result.passed:
        raise GateError(
            f"{path} ran, and is not proved: {proof.result.reason}",
            hint=f"these gates need more inputs: {', '.join(proof.result.skipped)}",
        )


def document(report: Report, proof: Proof | None) -> dict[str, Any]:
    """What `--format json` prints."""
    found: dict[str, Any] = {
        "path": str(report.path),
        "ok": report.ok,
        "artifact_id": report.artifact_id,
        "files": report.checked,
        "size_bytes": report.manifest.size_bytes if report.manifest else None,
        "problems": list(report.problems),
        "warnings": list(report.warnings),
    }
    if proof:
        found["parity"] = {
            "verdict": proof.result.verdict,
            "reason": proof.result.reason,
            "samples": proof.result.samples,
            "gates": [
                {"metric": v.metric, "value": v.value, "threshold": v.threshold, "outcome": str(v.outcome)}
                for v in proof.verdicts
            ],
            "skipped": list(proof.result.skipped),
            "attestation": str(proof.attestation) if proof.attestation else None,
        }
    return found


def text(report: Report, proof: Proof | None) -> str:
    """What a person reads."""
    assert report.manifest
    lines = [f"{report.path}: {report.checked} files, {megabytes(report.manifest.size_bytes)}, as the manifest says"]
    lines += [f"warning: {warning}" for warning in report.warnings]
    lines += [f"artifact {report.artifact_id}"]
    if proof:
        from pipeline.parity.gates import explain

        lines += [f"  {explain(verdict)}" for verdict in proof.verdicts]
        lines += [f"  {name}: not judged, it needs more than the golden inputs" for name in proof.result.skipped]
        verdict = "ran here, and there is no gate to judge" if not proof.verdicts else proof.result.verdict
        lines += [f"golden inputs on this machine ({proof.result.samples} samples): {verdict}"]
        lines += [f"attestation: {proof.attestation}"] if proof.attestation else []
    return "\n".join(lines)
