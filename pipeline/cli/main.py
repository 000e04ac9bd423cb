"""The command `enginewright`: finds the verb, and turns errors into messages and exit codes."""

from __future__ import annotations

import difflib
import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import click

from pipeline import __version__
from pipeline.cli.errors import report

VERBS = {
    "build": "Build every target of a recipe: export, quantize, compile, prove, package.",
    "draft": "Make the engines of a recipe alone, to look at: nothing is proved or packaged.",
    "init": "Write a commented recipe fitted to a model and to this host.",
    "verify": "Check an artifact against its manifest, and with --run prove it on this machine.",
    "inspect": "Show what an artifact is.",
    "push": "Push artifacts to a registry, a layout folder or a tar file.",
    "pull": "Pull the target that suits this machine, verified.",
    "ls": "List the versions of a repository, or the targets of a version.",
    "promote": "Copy a proved version to another repository or tag.",
    "copy": "Copy a version between registries, layout folders and tar files.",
    "keygen": "Make a pair of keys for signing.",
    "sign": "Sign an artifact and its attestations.",
    "diff": "Show what differs between two artifacts.",
    "drift": "Say whether a rebuild would give something else, and why.",
    "gc": "Remove from the local registry what no version needs.",
    "generate": "Generate text with an artifact.",
    "serve": "Serve an artifact behind OpenAI's API.",
    "bench": "Measure how fast artifacts are on this machine.",
    "compare": "One table and report of targets: quality, speed, size, and what each can do.",
    "doctor": "Say what is installed, and what this host can build and run.",
    "cache": "List, verify or clear the store of intermediate results.",
    "toolchain": "List or install interpreters for packages that do not install beside today's.",
    "schema": "Print the JSON schema of recipes, for editors.",
    "completion": "Print the shell completion script.",
}


INTERRUPTED = "interrupted: finished steps are kept, the next run goes on from there"


class Lazy(click.Group):
    """A group whose verbs are imported when they are asked for: `--help` costs nothing."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        gc.disable()  # what modules make while they load stays: a collection finds nothing
        try:
            command = getattr(importlib.import_module(f"pipeline.cli.{cmd_name}"), cmd_name)
        finally:
            gc.enable()
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in VERBS and (near := difflib.get_close_matches(args[0], VERBS, n=1)):
            raise click.UsageError(f"No such command {args[0]!r}. Did you mean {near[0]!r}?", ctx)
        return super().resolve_command(ctx, args)


@click.command(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="enginewright")
def cli() -> None:
    """One recipe in, one proved, servable engine out for each place a model has to run.

    Exit codes: 0 ok, 1 internal error, 3 a stage failed, 4 a gate failed, 5 target, toolchain or hardware not
    available, 6 verification failed, 7 registry or network, 64 recipe or usage wrong.
    """


def run(argv: Sequence[str]) -> int:
    """Run the command; its exit code."""
    # Said once for every library that any verb or child process may load.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    try:
        result: Any = cli.main(args=list(argv), prog_name="enginewright", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return 64
    except (KeyboardInterrupt, click.exceptions.Abort):
        click.echo(INTERRUPTED, err=True)
        return 130
    except SystemExit as terminated:
        click.echo(INTERRUPTED, err=True)
        return int(terminated.code or 0)
    except BrokenPipeError:
        # The reader has gone; say no more, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        return report(error)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """End as after Ctrl-C, with the children stopped and nothing half-made left, by the exit code of the signal."""
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point `enginewright`."""
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(run(sys.argv[1:]))


def build_main() -> None:
    """Entry point `build`: `build recipe.yaml` means `enginewright build recipe.yaml`."""
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(run(["build", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
