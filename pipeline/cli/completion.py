"""`enginewright completion SHELL`: the script that teaches a shell to complete this command."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the shell completion script.

    For example: `enginewright completion bash >> ~/.bashrc`.
    """
    from pipeline.cli.main import cli

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "enginewright", "_ENGINEWRIGHT_COMPLETE").source())
