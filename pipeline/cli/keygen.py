"""`enginewright keygen`: a pair of keys for signing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import click

from pipeline.trust import keys


@click.command()
@click.argument("name", type=click.Path(path_type=Path))
@click.option(
    "--kind", type=click.Choice(["ed25519", "p256", "p384"]), default="ed25519", show_default=True, help="Of the key."
)
def keygen(name: Path, kind: str) -> None:
    """Write NAME.key, which signs and is for its owner alone, and NAME.pub, which others check with.

    The private key is encrypted with ENGINEWRIGHT_KEY_PASSWORD if that is set. A key that is there is not overwritten.
    """
    password = os.environ.get(keys.PASSWORD_VARIABLE)
    private, public = keys.generate(cast(keys.Kind, kind), password.encode() if password else None)
    secret, shown = keys.write_pair(name, private, public)
    click.echo(f"{secret}  signs{'' if password else ' (not encrypted)'}")
    click.echo(f"{shown}  checks  {keys.public_key(shown).key_id}")
