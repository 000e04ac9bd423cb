"""`enginewright sign`: an artifact in a folder or in a registry, with its attestations."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from pipeline.artifact import attest
from pipeline.artifact.verify import verify as verified
from pipeline.cli import transfer
from pipeline.cli.cache import duration
from pipeline.registry import attestations, places, reference
from pipeline.registry.version import open_version
from pipeline.trust import keys
from pipeline.trust.sign import sign as signed


@click.command()
@click.argument("where", metavar="PATH|REF")
@click.option(
    "--key", "key_path", type=transfer.FILE, help="The private key's file. Default: $ENGINEWRIGHT_SIGNING_KEY."
)
@click.option("--expires", metavar="AGE", help="How long the signature holds, e.g. 90d. Default: without end.")
@click.option("--model-signing", "openssf", is_flag=True, help="Also in OpenSSF's format (folders; P-256 and P-384).")
@transfer.target_name
@transfer.out
@transfer.plain_http
@transfer.form
def sign(
    where: str,
    key_path: Path | None,
    expires: str | None,
    openssf: bool,
    target: str | None,
    out: Path,
    plain_http: bool,
    form: str,
) -> None:
    """Sign the artifact in a folder, or every target of a version, and each of its attestations.

    A folder is verified first; its envelopes are written to .attest/ and travel with `push`. Of a version the envelopes
    are added to the registry. What this key has signed already is not signed again.
    """
    key = keys.private_key(key_path)
    until = datetime.now(UTC) + timedelta(seconds=duration(expires)) if expires else None
    made: dict[str, list[str]] = {}
    if reference.is_reference(where):
        ref = reference.parse(where)
        repository = places.reading(ref, out, plain_http=plain_http)
        version = open_version(repository, ref)
        for each in [version.named(target)] if target else version.targets:
            said = attestations.fetch(repository, each.descriptor.digest, each.artifact_id)
            new = signed(each.manifest, each.artifact_id, said, key, expires=until)
            attestations.attach(repository, each.descriptor, new, each.artifact_id)
            made[each.manifest.target.name] = sorted(new)
    else:
        folder = Path(where)
        report = verified(folder)
        assert report.manifest and report.artifact_id
        new = signed(report.manifest, report.artifact_id, attestations.of_folder(folder), key, expires=until)
        for name, data in new.items():
            attest.write_file(folder, name, data)
        made[report.manifest.target.name] = sorted(new)
        if openssf:
            from pipeline.trust import openssf as model_signing

            made[report.manifest.target.name].append(model_signing.sign(folder, key).name)
    if form == "json":
        click.echo(json.dumps({"key": key.public.key_id, "signed": made}, indent=2))
        return
    for name, files in made.items():
        click.echo(f"{name}: {', '.join(files) if files else 'all of it was signed already'}")
    click.echo(f"key {key.public.key_id}")
