"""A draft: an engine's files and `draft.json`, which says that nothing was proved. It has no manifest: no artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.artifact import swap
from pipeline.artifact.package import disk_error, regular_files
from pipeline.artifact.paths import DRAFT
from pipeline.artifact.place import Link, place, write
from pipeline.digest import canonical
from pipeline.errors import StageError


def put(engine_dir: Path, destination: Path, said: Mapping[str, object], link: Link = "auto") -> bool:
    """Make `destination` the draft of an engine; False when it was there already. `said` goes to `draft.json`.

    What is there stays until the new one is whole. Raises StageError for a destination that is something else, for an
    engine with a file of that name, and when the disk refuses.
    """
    files, note = regular_files(engine_dir), canonical({**said, "proved": False})
    if DRAFT in files:
        raise StageError(f"{files[DRAFT]}: a draft itself uses this name", hint="the engine step must not write it")
    destination = destination.resolve()  # a link to a larger disk stays
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with swap.locked(destination):
            swap.recover(destination)
            check_replaceable(destination)
            if _present(destination, files, note):
                return False
            with swap.replacing(destination) as new:
                for name, path in files.items():
                    place(path, new / name, link)
                write(note, new / DRAFT)
    except OSError as error:
        raise disk_error(error, files, destination) from error
    return True


def check_replaceable(destination: Path) -> None:
    """Refuse to replace what is no draft: an artifact, or somebody's folder. Raises StageError."""
    if destination.is_dir() and (not any(destination.iterdir()) or (destination / DRAFT).is_file()):
        return
    if destination.exists():
        raise StageError(f"{destination} is there and is no draft", hint="move it away, or choose another --out")


def _present(destination: Path, files: Mapping[str, Path], note: bytes) -> bool:
    """Whether the draft is there and its files are those of the store, by link or by size and time of change."""
    if not destination.is_dir():
        return False
    there = regular_files(destination)
    if DRAFT not in there or there.pop(DRAFT).read_bytes() != note or there.keys() != files.keys():
        return False
    pairs = ((files[name].stat(), path.stat()) for name, path in there.items())
    return all((one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns) for one, other in pairs)
