"""Verification of what is in a registry, and of what a policy says of an artifact anywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline import hardware as machines
from pipeline.artifact import attest as attesting
from pipeline.artifact.verify import Report
from pipeline.cli import transfer
from pipeline.cli.console import megabytes
from pipeline.errors import GateError
from pipeline.registry import attestations, places
from pipeline.registry import pull as pulling
from pipeline.registry.pack import Unpacked
from pipeline.registry.reference import Reference, version_tag
from pipeline.registry.repository import Repository
from pipeline.registry.stream import verified
from pipeline.registry.transfer import child_tag
from pipeline.registry.version import Version, choose, open_version
from pipeline.trust import policy as policies
from pipeline.trust.keys import PrivateKey, private_key
from pipeline.trust.policy import Finding, Policy
from pipeline.trust.sign import envelope

if TYPE_CHECKING:
    from pipeline.artifact.prove import Proof


def verify(
    where: Reference,
    out: Path,
    policy: Policy | None,
    *,
    run: bool,
    attest: bool,
    sign_key: Path | None,
    target: str | None,
    plain_http: bool,
    form: str,
    hidden: bool,
) -> None:
    """`verify REF`: every byte of every target (or of one) is read and checked; with `run` the one for here is run."""
    signer = private_key(sign_key) if attest else None  # asked first: nobody wants to hear of it after the run
    repository = places.reading(where, out, plain_http=plain_http)
    version = open_version(repository, where)
    chosen = [version.named(target)] if target else list(version.targets)
    if run and not target:
        chosen = [choose(version, machines.probe())[0]]
    said = {
        each.manifest.target.name: attestations.fetch(repository, each.descriptor.digest, each.artifact_id)
        for each in chosen
    }
    found: dict[str, Any] = {
        "reference": str(where.at(where.tag, version.descriptor.digest)),
        "ok": True,
        "targets": [],
    }
    for each in chosen:
        name = each.manifest.target.name
        what = f"{where.name} ({name})"
        findings = (
            policies.require(policy, each.manifest, each.artifact_id, said[name], what) if policy is not None else []
        )
        if not run:
            _read(repository, each, hidden=hidden)
        row = {"target": name, "artifact_id": each.artifact_id, "attestations": sorted(said[name])}
        found["targets"].append({**row, "policy": [asdict(finding) for finding in findings]})
        if form == "text":
            size = megabytes(each.manifest.size_bytes)
            click.echo(f"{what}: {len(each.manifest.files)} files, {size}, as the manifest says")
            click.echo(f"artifact {each.artifact_id}")
            show_findings(findings)
    if run:
        proof = _prove(version, chosen[0], said[chosen[0].manifest.target.name], out, where, signer, hidden=hidden)
        found["parity"] = {"verdict": proof.result.verdict, "reason": proof.result.reason}
        if form == "text":
            click.echo(f"golden inputs on this machine ({proof.result.samples} samples): {proof.result.verdict}")
    if form == "json":
        click.echo(json.dumps(found, indent=2))
    if run:
        require_passed(proof, str(where))


def _read(repository: Repository, target: Unpacked, *, hidden: bool) -> None:
    """Every byte of a target, checked and forgotten."""
    done: set[str] = set()
    label = f"verify {target.manifest.target.name}"
    with transfer.advancing(label, target.manifest.size_bytes, hidden=hidden) as advance:
        for path, layer in target.layers.items():
            if layer.digest not in done:
                done.add(layer.digest)
                for block in verified(repository, layer, name=path):
                    advance(len(block))


def _prove(
    version: Version,
    target: Unpacked,
    said: dict[str, bytes],
    out: Path,
    where: Reference,
    signer: PrivateKey | None,
    *,
    hidden: bool,
) -> Proof:
    """Pull, run, and put what was found, signed, where the artifact came from."""
    from pipeline.artifact.prove import verify_run

    manifest = target.manifest
    store = places.local(out, manifest.name)
    destination = out / manifest.name / manifest.target.name
    label = f"pull {manifest.target.name}"
    with store.using(), transfer.advancing(label, manifest.size_bytes, hidden=hidden) as advance:
        pulling.pull(version.repository, target, said, store, destination, advance=advance)
        tag = child_tag(where.tag or version_tag(manifest.version), manifest.target.name)
        pulling.keep(version.repository, target, said, store, tag, destination)
    proof = verify_run(destination, write=signer is not None)
    if signer:
        new: dict[str, bytes] = {}
        for written in (proof.attestation, proof.benchmark):
            for path in (written, sign_file(proof.report, written, signer)) if written else ():
                new[path.name] = path.read_bytes()
        attestations.attach(version.repository, target.descriptor, new, target.artifact_id)
    return proof


def sign_file(report: Report, attestation: Path, key: PrivateKey) -> Path:
    """The signed envelope beside an attestation in a folder."""
    return attesting.write_file(report.path, f"{attestation.stem}.dsse", envelope(attestation.read_bytes(), key))


def judge_folder(report: Report, policy: Policy | None) -> list[Finding]:
    """The policy on a verified artifact in a folder. VerificationError when it is not met."""
    if policy is None:
        return []
    assert report.manifest and report.artifact_id
    files = attestations.of_folder(report.path)
    return policies.require(policy, report.manifest, report.artifact_id, files, str(report.path))


def show_findings(findings: Sequence[Finding]) -> None:
    """The policy's demands and what meets them."""
    for each in findings:
        click.echo(f"  {each.demand}: {each.reason}")


def require_passed(proof: Proof, where: str) -> None:
    """GateError unless the golden inputs passed on this machine."""
    if proof.result.failed:
        raise GateError(
            f"{where} does not pass on this machine: {proof.result.reason}",
            hint="`enginewright inspect` shows what the build measured: this machine or its runtime differs",
        )
    if proof.result.skipped and not proof.result.passed:
        raise GateError(
            f"{where} ran, and is not proved: {proof.result.reason}",
            hint=f"these gates need more inputs: {', '.join(proof.result.skipped)}",
        )
