"""How an error looks on a terminal: what is wrong, and what to do; a traceback only for a bug."""

from __future__ import annotations

import traceback

import click

from pipeline.errors import EnginewrightError


def report(error: BaseException) -> int:
    """Say what went wrong on standard error; its exit code. Anything but an EnginewrightError is a bug of ours."""
    if not isinstance(error, EnginewrightError):
        traceback.print_exception(error)
        click.echo("error: this is a bug in enginewright: please report it with the traceback above", err=True)
        return 1
    click.echo(f"error: {error.message}", err=True)
    if error.hint:
        click.echo("\n".join(f"hint: {line}" for line in error.hint.splitlines()), err=True)
    return error.exit_code
