"""`enginewright pull`: the target that suits this machine, verified while it comes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from pipeline import hardware as machines
from pipeline.cli import transfer
from pipeline.cli.console import megabytes, table
from pipeline.registry import attestations, places, reference
from pipeline.registry import pull as pulling
from pipeline.registry.reference import version_tag
from pipeline.registry.select import Fit
from pipeline.registry.transfer import child_tag
from pipeline.registry.version import choose, open_version


@click.command()
@click.argument("ref")
@transfer.target_name
@click.option("--hardware", "machine", default="host", show_default=True, help="Choose for this machine: a profile.")
@click.option("--ignore-runtime", is_flag=True, help="Choose by the hardware alone, whatever is installed here.")
@click.option("--dry-run", is_flag=True, help="Show which target would be pulled, and why; fetch no file.")
@transfer.policy_file
@transfer.verify_key
@transfer.out
@transfer.plain_http
@transfer.form
@transfer.silent
def pull(
    ref: str,
    target: str | None,
    machine: str,
    ignore_runtime: bool,
    dry_run: bool,
    policy_path: Path | None,
    keys: Sequence[Path],
    out: Path,
    plain_http: bool,
    form: str,
    quiet: bool,
) -> None:
    """Pull from REF the target that suits this machine best, into artifacts/NAME/TARGET.

    Targets are ranked: built for exactly this device, of its family, for instructions that it has, portable. Nothing
    that fits: exit code 5, with the reason for each. With --policy or --key the attestations are checked before any
    file is fetched. Every byte is verified while it comes; what is wrong never reaches the folder (exit code 6).
    """
    where = reference.parse(ref)
    policy = transfer.trusted(policy_path, keys)
    repository = places.reading(where, out, plain_http=plain_http)
    version = open_version(repository, where)
    hardware = machines.load(machine)
    fits: list[Fit] = []
    if target:
        chosen = version.named(target)
    else:
        chosen, fits = choose(version, hardware, runtimes=machine == "host" and not ignore_runtime)
    manifest = chosen.manifest
    shown = table(("TARGET", "FIT", "WHY"), [(each.target, each.rank, each.reason) for each in fits]) if fits else ""
    if form == "text" and shown:
        click.echo(shown, err=not dry_run)
    said = attestations.fetch(repository, chosen.descriptor.digest, chosen.artifact_id)
    if policy:
        from pipeline.trust import policy as policies

        policies.require(policy, manifest, chosen.artifact_id, said, f"{where.name} ({manifest.target.name})")
    pinned = str(where.at(where.tag, version.descriptor.digest))
    document = {
        "reference": pinned,
        "target": manifest.target.name,
        "artifact_id": chosen.artifact_id,
        "size_bytes": manifest.size_bytes,
        "fits": [{"target": each.target, "rank": each.rank, "reason": each.reason} for each in fits],
    }
    if dry_run:
        click.echo(
            json.dumps(document, indent=2) if form == "json" else f"{manifest.target.name}  {chosen.artifact_id}"
        )
        return
    store = places.local(out, manifest.name)
    destination = out / manifest.name / manifest.target.name
    label = f"pull {manifest.target.name}"
    with store.using(), transfer.advancing(label, manifest.size_bytes, hidden=quiet) as advance:
        made = pulling.pull(repository, chosen, said, store, destination, advance=advance)
        tag = child_tag(where.tag or version_tag(manifest.version), manifest.target.name)
        pulling.keep(repository, chosen, said, store, tag, made.path)
    document |= {"path": str(made.path), "fetched_bytes": made.fetched_bytes, "changed": made.changed}
    if form == "json":
        click.echo(json.dumps(document, indent=2))
        return
    click.echo(f"{made.path}{'' if made.changed else ' (unchanged)'}, fetched {megabytes(made.fetched_bytes)}")
    click.echo(f"artifact {made.artifact_id}")
    click.echo(pinned)
