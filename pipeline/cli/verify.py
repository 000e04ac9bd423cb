"""`enginewright verify`: an artifact against its manifest, and on request against the reference on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.artifact.verify import Report, examine, require
from pipeline.cli import remote, transfer
from pipeline.cli.console import megabytes
from pipeline.errors import RecipeError
from pipeline.registry import reference
from pipeline.trust.keys import KEY_VARIABLE, private_key
from pipeline.trust.policy import Finding

if TYPE_CHECKING:
    from pipeline.artifact.prove import Proof


@click.command()
@click.argument("where", metavar="PATH|REF")
@click.option("--run", is_flag=True, help="Run the golden inputs on this machine and judge them by the gates.")
@click.option(
    "--attest", is_flag=True, help="With --run: write the result to .attest/; of a REF signed, to the registry, too."
)
@transfer.policy_file
@transfer.verify_key
@click.option("--sign-key", type=transfer.FILE, help="Sign what --attest writes. Default: $ENGINEWRIGHT_SIGNING_KEY.")
@click.option(
    "--model-signing", "openssf", is_flag=True, help="With --key: check a signature in OpenSSF's format, too."
)
@transfer.target_name
@transfer.out
@transfer.plain_http
@transfer.form
@transfer.silent
def verify(
    where: str,
    run: bool,
    attest: bool,
    policy_path: Path | None,
    keys: Sequence[Path],
    sign_key: Path | None,
    openssf: bool,
    target: str | None,
    out: Path,
    plain_http: bool,
    form: str,
    quiet: bool,
) -> None:
    """Check the artifact in the folder PATH, or a version in a registry: every byte, nothing missing, nothing added.

    With --policy or --key also who signed it and what is attested. --run on a REF pulls the target for this machine.

    Exit codes: 0 it is what its manifest says (and with --run every gate passed), 4 a gate failed, 5 the runtime or the
    hardware is not here, 6 it is not what its manifest says, or not what the policy allows.
    """
    if attest and not run:
        raise RecipeError("--attest writes down what --run found", hint="add --run")
    if openssf and len(keys) != 1:
        raise RecipeError("--model-signing needs the public key", hint="give one --key FILE")
    policy = transfer.trusted(policy_path, keys)
    if reference.is_reference(where):
        remote.verify(
            reference.parse(where), out, policy,
            run=run, attest=attest, sign_key=sign_key, target=target, plain_http=plain_http, form=form, hidden=quiet,
        )  # fmt: skip
        return
    path = Path(where)
    report = examine(path)
    if not report.ok:
        if form == "json":
            click.echo(json.dumps(document(report, None), indent=2))
        require(report)
    findings = remote.judge_folder(report, policy)
    if openssf:
        from pipeline.trust import openssf as model_signing

        model_signing.check(path, keys[0])
    signer = private_key(sign_key) if attest and (sign_key or os.environ.get(KEY_VARIABLE)) else None
    proof = None
    if run:
        from pipeline.artifact.prove import prove

        proof = prove(report, write=attest)
        for written in (proof.attestation, proof.benchmark) if signer else ():
            if signer and written:
                remote.sign_file(report, written, signer)
    click.echo(json.dumps(document(report, proof, findings), indent=2) if form == "json" else text(report, proof))
    if form == "text":
        remote.show_findings(findings)
    if proof:
        remote.require_passed(proof, where)


def document(report: Report, proof: Proof | None, findings: Sequence[Finding] = ()) -> dict[str, Any]:
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
    if findings:
        found["policy"] = [asdict(each) for each in findings]
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
