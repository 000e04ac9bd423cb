"""`enginewright cache`: the store of intermediate results."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from pathlib import Path

import click

from pipeline.errors import RecipeError, VerificationError
from pipeline.store import Entry, Store, open_store

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def size(text: str) -> int:
    """`20GB` -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if not match:
        raise RecipeError(f"{text!r} is not a size", hint="for example 500MB or 20GB")
    return int(float(match[1]) * UNITS[match[2]])


def duration(text: str) -> float:
    """`30d` -> seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip().lower())
    if not match:
        raise RecipeError(f"{text!r} is not a duration", hint="for example 12h or 30d")
    return float(match[1]) * SECONDS[match[2]]


location = click.option(
    "--cache", "root", type=click.Path(path_type=Path), help="The store. Default: $ENGINEWRIGHT_CACHE or ~/.cache."
)


@click.group()
def cache() -> None:
    """List, verify or clear the store of intermediate results."""


@cache.command()
@location
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", help="json: one document.")
def ls(root: Path | None, form: str) -> None:
    """List the results, with their sizes."""
    store = open_store(root)
    rows = []
    for key in store.entries():
        entry = store.get(key, thin=True)
        size_bytes = sum(file["size"] for file in entry.files if not file.get("dropped")) if entry else 0
        rows.append({"key": key, "size_bytes": size_bytes, "state": _state(store, key, entry)})
    if form == "json":
        click.echo(json.dumps({"root": str(store.root), "results": rows}, indent=2))
        return
    for row in rows:
        click.echo(f"{int(str(row['size_bytes'])) / 1e6:10.1f} MB  {row['key']}  {row['state']}")
    click.echo(f"{sum(int(str(r['size_bytes'])) for r in rows) / 1e6:10.1f} MB  {len(rows)} results in {store.root}")


def _state(store: Store, key: str, entry: Entry | None) -> str:
    if entry is None:
        return store.corrupt.get(key, "gone")
    return "ok" if entry.whole else "ok, without its large files"


@cache.command()
@location
@click.option("--older-than", default="0s", help="Only results not used for so long, e.g. 30d.")
@click.option("--max-size", default=None, help="Remove the least recently used until so much is left, e.g. 20GB.")
def gc(root: Path | None, older_than: str, max_size: str | None) -> None:
    """Remove results, the least recently used first (without options: all).

    What a build uses now stays.
    """
    store = open_store(root)
    limit = size(max_size) if max_size else None
    removed = results(store, duration(older_than), limit)
    if limit is None:
        removed += downloads(store, duration(older_than))
    removed += leftovers(store)
    click.echo(f"removed {len(removed)} results, {sum(bytes_ for _, bytes_ in removed) / 1e6:.1f} MB")


def results(store: Store, older_than_s: float = 0, max_bytes: int | None = None) -> list[tuple[str, int]]:
    """Remove results not used for `older_than_s`, the least recently used first, until `max_bytes` are left."""
    used = []
    for key in store.entries():
        with contextlib.suppress(FileNotFoundError):  # somebody else removes, too
            files = [path.stat() for path in store.path(key).rglob("*") if path.is_file()]
            used.append((store.path(key).stat().st_mtime, key, sum(file.st_size for file in files)))
    total, removed = sum(size_bytes for _, _, size_bytes in used), []
    for when, key, size_bytes in sorted(used):
        if time.time() - when < older_than_s or (max_bytes is not None and total <= max_bytes):
            continue
        if store.remove(key):
            total -= size_bytes
            removed.append((key, size_bytes))
    return removed


def downloads(store: Store, older_than_s: float) -> list[tuple[str, int]]:
    """Remove what was kept of downloads, and the pieces of those that broke off."""
    removed = []
    folder = store.root / "sources"
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file() and time.time() - path.stat().st_mtime >= older_than_s:
            removed.append((path.name, path.stat().st_size))
            path.unlink(missing_ok=True)
    return removed


def leftovers(store: Store) -> list[tuple[str, int]]:
    """Remove what killed builders left half-made. What is being made now is locked, and stays."""
    removed = []
    for path in sorted((store.root / "scratch").glob("*")):
        with (store.root / "locks" / path.name.rpartition(".")[0]).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
            removed.append((path.name, sum(file.stat().st_size for file in files)))
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    for folder in (store.root, store.root / "sources"):  # `.name.<process id>`, of processes that are no more
        for path in folder.glob(".*.*"):
            owner = path.name.rpartition(".")[2]
            if owner.isdigit() and not _alive(int(owner)):
                removed.append((path.name, path.stat().st_size))
                path.unlink(missing_ok=True)
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


@cache.command()
@location
@click.option("--remove", is_flag=True, help="Remove what is corrupt; the next build makes it again.")
def verify(root: Path | None, remove: bool) -> None:
    """Hash every file of every result and compare."""
    store = open_store(root)
    keys = list(store.entries())
    bad = [key for key in keys if store.get(key, deep=True, thin=True) is None]
    for key in bad:
        click.echo(f"corrupt: {key}: {store.corrupt.get(key, 'gone')}")
        if remove and not store.remove(key):
            click.echo(f"a build uses it now: {key}")
    click.echo(f"{len(keys) - len(bad)} of {len(keys)} results are whole")
    if bad and not remove:
        raise VerificationError(f"{len(bad)} results are corrupt", hint="`enginewright cache verify --remove`")
