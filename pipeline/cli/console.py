"""How a build shows itself: a live table on a terminal, plain lines in a pipe, NDJSON events for programs."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from pipeline.errors import RecipeError

if TYPE_CHECKING:
    from pipeline.run.once import Event

Listener = Callable[["Event"], None]


def megabytes(size_bytes: float) -> str:
    """Bytes as text: `17.2 MB`."""
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes < 1e9 else f"{size_bytes / 1e9:.2f} GB"


def cost(event: Event) -> str:
    """What a finished step cost, as text."""
    return (
        f"{event['wall_s']:.1f} s, {event['cpu_s']:.1f} CPU s, peak {megabytes(event['peak_rss_bytes'])}, "
        f"wrote {megabytes(event['size_bytes'])}"
    )


def _plain(event: Event) -> None:
    lines = {
        "start": lambda: f"{event['step']}: started",
        "done": lambda: f"{event['step']}: done ({cost(event)})",
        "corrupt": lambda: f"{event['step']}: the stored result is corrupt ({event['reason']}): building it again",
        "failed": lambda: f"{event['step']}: failed",
        "note": lambda: f"note: {event['note']}",
    }
    if event["event"] == "hit" and event.get("shared"):
        click.echo(f"{event['step']}: from the shared store ({megabytes(event['size_bytes'])})", err=True)
    if line := lines.get(event["event"]):
        click.echo(line(), err=True)


@contextlib.contextmanager
def _live(labels: Sequence[str]) -> Iterator[Listener]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=8) as progress:
        rows = {label: progress.add_task(label, total=1, start=False, note="waiting", visible=True) for label in labels}

        def listen(event: Event) -> None:
            if event["event"] == "note":
                progress.console.print(f"note: {event['note']}", markup=False)
            row = rows.get(event["step"])
            if row is None:
                return
            if event["event"] == "hit":
                where = "from the shared store" if event.get("shared") else "in the store"
                progress.start_task(row)
                progress.update(row, total=1, completed=1, note=f"[dim]{where}[/dim]")
            elif event["event"] == "start":
                progress.start_task(row)
                progress.update(row, total=None, note="")
            elif event["event"] == "progress":
                progress.update(row, total=event["total"] or None, completed=event["done"], note=event["note"])
            elif event["event"] == "done":
                progress.update(row, total=1, completed=1, note=f"[green]{cost(event)}[/green]")
            elif event["event"] == "corrupt":
                progress.update(row, note=f"[yellow]corrupt: {event['reason']}[/yellow]")
            elif event["event"] == "failed":
                progress.stop_task(row)
                progress.update(row, note="[red]failed[/red]")

        yield listen


@contextlib.contextmanager
def listening(labels: Sequence[str], events: IO[str] | None, *, quiet: bool) -> Iterator[Listener]:
    """A listener for the runner's events. `labels` are the steps that will run; `events` receives NDJSON."""
    started = time.time()
    with contextlib.ExitStack() as stack:
        if quiet or not labels:
            show: Listener = lambda event: None  # noqa: E731
        elif sys.stderr.isatty():
            show = stack.enter_context(_live(labels))
        else:
            show = _plain

        def listen(event: Event) -> None:
            if events:
                events.write(json.dumps({"time_s": round(time.time() - started, 3), **event}) + "\n")
                events.flush()
            show(event)

        yield listen


@contextlib.contextmanager
def opened(events: str | None) -> Iterator[IO[str] | None]:
    """The place for NDJSON events: a file, or `-` for standard error."""
    if events is None:
        yield None
    elif events == "-":
        yield sys.stderr
    else:
        try:
            Path(events).parent.mkdir(parents=True, exist_ok=True)
            handle = Path(events).open("w", encoding="utf-8")  # noqa: SIM115  closed below
        except OSError as error:
            raise RecipeError(f"--events: {events} cannot be written: {error.strerror}") from None
        with handle:
            yield handle


@contextlib.contextmanager
def stepping(what: str, *, quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on standard error that is told (done, of how many, a note); nothing where that is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total, note: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        row = progress.add_task(what)
        yield lambda done, total, note: progress.update(row, completed=done, total=total, description=note)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Left-aligned columns as plain text, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    right = [all(_number(row[column]) for row in cells[1:]) and len(cells) > 1 for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join(line(row) for row in cells)


def _number(text: str) -> bool:
    return text in ("", "-") or re.fullmatch(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?%| [kMGT]?B)?", text) is not None
