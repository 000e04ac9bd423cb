"""The lock file: what a recipe's sources were pinned to, for people, for git and for `--locked`."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError
from pipeline.frozen import frozen
from pipeline.source import SourceFile, name_problem

SCHEMA = 1
COMMIT = re.compile(r"[0-9a-f]{40}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
HINT = "delete it, or run with --update: it is written anew"


@frozen
class Entry:
    """A pinned source: `source` as the recipe names it, `revision` a commit of the hub."""

    source: str
    revision: str | None
    files: tuple[SourceFile, ...]
    code: bool = False
    """Whether Python files were wanted."""


def read(path: Path) -> dict[str, Entry]:
    """Role -> entry; empty when there is no lock. Raises RecipeError with the line of what is wrong."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}", hint=HINT) from None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "it has a merge conflict: take one side, or delete it" if "<<<<<<<" in text else HINT
        raise RecipeError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}", hint=hint) from None
    if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
        raise RecipeError(f"{path}: not a lock of schema {SCHEMA}", hint=HINT)
    try:
        return {role: _entry(value) for role, value in content.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"{path} is damaged: {error}", hint=HINT) from None


def _entry(value: Mapping[str, Any]) -> Entry:
    files = tuple(
        SourceFile(path=path, size=file["size"], digest=file["digest"]) for path, file in value["files"].items()
    )
    for file in files:
        if name_problem(file.path):
            raise ValueError(f"the file name {file.path!a} {name_problem(file.path)}")
        if not isinstance(file.size, int) or file.size < 0 or not DIGEST.fullmatch(file.digest):
            raise ValueError(f"size or digest of {file.path} is not one")
    revision = value.get("revision")
    if not isinstance(value["source"], str):
        raise ValueError("a source is not a text")
    if value["source"].startswith("hf:") and not (revision and COMMIT.fullmatch(revision)):
        raise ValueError(f"{value['source']} has no commit")
    if value["source"].startswith("hf:") and "config.json" not in value["files"]:
        raise ValueError(f"{value['source']} has no config.json")
    return Entry(value["source"], revision, files, bool(value.get("trust_remote_code", False)))


def write(path: Path, entries: Mapping[str, Entry], *, needed: bool) -> str:
    """Write the lock, whole or not at all, if it differs from what is there.

    Returns what the user should hear when the folder is not writable, or raises RecipeError when the lock is `needed`:
    without it the next build could get another commit.
    """
    content = {"schema": SCHEMA} | {role: _plain(entry) for role, entry in entries.items()}
    data = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    with contextlib.suppress(OSError):
        if path.read_bytes() == data:
            return ""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(data)
        scratch.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        note = f"{path} cannot be written: {error.strerror}"
        if needed:
            raise RecipeError(note, hint="put the recipe where you may write, or bring its lock") from None
        return note
    return ""


def _plain(entry: Entry) -> dict[str, Any]:
    plain: dict[str, Any] = {"source": entry.source}
    if entry.revision:
        plain["revision"] = entry.revision
    if entry.code:
        plain["trust_remote_code"] = True
    plain["files"] = {file.path: {"size": file.size, "digest": file.digest} for file in entry.files}
    return plain


def compare(path: Path, old: Mapping[str, Entry], new: Mapping[str, Entry]) -> None:
    """Raise one RecipeError with every difference between the lock and what is there."""
    found = []
    for role in sorted({*old, *new}):
        if role not in new or role not in old:
            found.append(f"{role}: {'not in the recipe' if role in old else 'not in the lock'}")
            continue
        before, now = old[role], new[role]
        if (before.source, before.code) != (now.source, now.code):
            found.append(f"{role}: the lock has {before.source}, the recipe {now.source}")
        was, is_ = ({file.path: file.digest for file in entry.files} for entry in (before, now))
        found += [
            f"{role}: {name}: {was.get(name, 'not there')} -> {is_.get(name, 'not there')}"
            for name in sorted(was | is_)
            if was.get(name) != is_.get(name)
        ]
    if found:
        raise RecipeError(
            f"{path} does not match, and --locked forbids to change it:\n  " + "\n  ".join(found),
            hint="bring the files back, or run without --locked and commit the new lock",
        )
