"""What the verbs that speak to registries share: their options, a progress bar, and a policy from the command line."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.cli.console import megabytes
from pipeline.registry.repository import Advance, quiet

if TYPE_CHECKING:
    from pipeline.trust.policy import Policy

F = TypeVar("F", bound=Callable[..., Any])
SAY_EVERY_S = 10.0
FILE = click.Path(path_type=Path)

form = click.option(
    "--format", "form", type=click.Choice(["text", "json"]), default="text", help="json: one document on stdout."
)
out = click.option(
    "--out", type=FILE, default=Path("artifacts"), show_default=True, help="Where artifacts and `local:` are."
)
plain_http = click.option("--plain-http", is_flag=True, help="Speak HTTP without TLS (loopback needs no flag).")
silent = click.option("--quiet", "-q", is_flag=True, help="No progress.")
force_tag = click.option("--force-tag", is_flag=True, help="Move a tag that stands for something else.")
policy_file = click.option("--policy", "policy_path", type=FILE, help="Refuse what this policy file does not allow.")
verify_key = click.option(
    "--key", "keys", type=FILE, multiple=True, help="Refuse what is not signed by this public key (may be repeated)."
)
target_name = click.option("--target", metavar="NAME", help="This target, whatever the hardware.")


def trusted(policy_path: Path | None, keys: Sequence[Path]) -> Policy | None:
    """The policy of `--policy` and `--key`; None when neither is given."""
    if not policy_path and not keys:
        return None
    from pipeline.trust.policy import load, of_keys

    if policy_path:
        return load(policy_path, keys)
    return of_keys(keys)


@contextlib.contextmanager
def advancing(label: str, total: int, *, hidden: bool) -> Iterator[Advance]:
    """A progress bar on a terminal, a line now and then in a pipe; told in bytes."""
    if hidden or not total:
        yield quiet
    elif sys.stderr.isatty():
        with _bar(label, total) as advance:
            yield advance
    else:
        yield _lines(label, total)


@contextlib.contextmanager
def _bar(label: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(24), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), refresh_per_second=8) as progress:
        row = progress.add_task(label, total=total)
        yield lambda size: progress.advance(row, size)


def _lines(label: str, total: int) -> Advance:
    done, said = 0, time.monotonic()

    def advance(size: int) -> None:
        nonlocal done, said
        done += size
        if time.monotonic() - said >= SAY_EVERY_S:
            said = time.monotonic()
            click.echo(f"{label}: {megabytes(done)} of {megabytes(total)} ({done * 100 // total} %)", err=True)

    return advance


def tell_ci(outputs: dict[str, str], summary: Sequence[str] = ()) -> None:
    """Append to GITHUB_OUTPUT and GITHUB_STEP_SUMMARY where a workflow has set them."""
    for variable, lines in (
        ("GITHUB_OUTPUT", [f"{name}={value}" for name, value in outputs.items()]),
        ("GITHUB_STEP_SUMMARY", list(summary)),
    ):
        path = os.environ.get(variable)
        if not path or not lines:
            continue
        try:
            with Path(path).open("a", encoding="utf-8") as handle:
                handle.write("\n".join(lines) + "\n")
        except OSError as error:
            click.echo(f"note: {variable} ({path}) cannot be written: {error.strerror}", err=True)
