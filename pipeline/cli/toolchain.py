"""`enginewright toolchain`: interpreters for packages that do not install beside today's."""

from __future__ import annotations

import click

from pipeline.errors import UnavailableError
from pipeline.places import toolchain_home
from pipeline.run import toolchain as chains


@click.group()
def toolchain() -> None:
    """List or install toolchains."""


@toolchain.command()
def ls() -> None:
    """List the toolchains and where each one is."""
    for name in ("default", *chains.names()):
        try:
            click.echo(f"{name:12} {chains.interpreter(name, {})}")
        except UnavailableError:
            click.echo(f"{name:12} not installed")


@toolchain.command()
@click.argument("name")
def install(name: str) -> None:
    """Create the toolchain NAME from its locked requirements."""
    click.echo(f"installing {name} into {toolchain_home(name)} (this takes minutes)", err=True)
    click.echo(chains.install(name))
