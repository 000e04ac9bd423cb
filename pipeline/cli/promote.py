"""`enginewright promote`: a version that is proved, from one repository or tag to another, every digest unchanged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from pipeline.cli import transfer
from pipeline.cli.copy import carry, show
from pipeline.registry import places, proof, reference
from pipeline.registry.version import open_version
from pipeline.trust import policy as policies


@click.command()
@click.argument("source")
@click.argument("destination")
@click.option("--allow-deferred", is_flag=True, help="Also targets that no machine has proved yet (never failed ones).")
@transfer.policy_file
@transfer.verify_key
@transfer.force_tag
@transfer.out
@transfer.plain_http
@transfer.form
@transfer.silent
def promote(
    source: str,
    destination: str,
    allow_deferred: bool,
    policy_path: Path | None,
    keys: Sequence[Path],
    force_tag: bool,
    out: Path,
    plain_http: bool,
    form: str,
    quiet: bool,
) -> None:
    """Copy the version SOURCE to DESTINATION if every target has a parity attestation that passed.

    Exit code 4 with the targets that have none, 6 when the policy is not met. Within a registry no byte moves: blobs
    are mounted. Targets, attestations and digests arrive as they were.
    """
    origin, goal = reference.parse(source), reference.parse(destination)
    policy = transfer.trusted(policy_path, keys)
    repository = places.reading(origin, out, plain_http=plain_http)
    version = open_version(repository, origin)
    said = proof.said_of(version)
    if policy:
        for each in version.targets:
            name = each.manifest.target.name
            policies.require(policy, each.manifest, each.artifact_id, said[name], f"{origin.name} ({name})")
    found = proof.require(version, said, allow_deferred=allow_deferred)
    if not policy:
        click.echo("note: no signature was checked: give --policy or --key", err=True)
    done = carry(
        repository, origin.at(digest=version.descriptor.digest, tag=origin.tag), goal, out,
        plain_http=plain_http, force=force_tag, hidden=quiet, label="promote",
    )  # fmt: skip
    if form == "json":
        targets = [{"target": each.target, "parity": each.verdict} for each in found]
        click.echo(json.dumps({**done, "targets": targets}, indent=2))
        return
    for judged in found:
        click.echo(f"{judged.target}: parity {judged.verdict}")
    show(done)
