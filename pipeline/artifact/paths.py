"""Rules for the paths and values that a manifest may hold: a value in, what is wrong with it or None out."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

MANIFEST = "manifest.json"
ATTESTATIONS = ".attest"
GOLDEN = "golden"
DRAFT = "draft.json"
"""Beside an engine that nothing has proved, in the manifest's place."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_DRIVE = re.compile(r"[A-Za-z]:")
_DEVICES = {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(1, 10)), *(f"lpt{i}" for i in range(1, 10))}
MAX_INT = 2**53 - 1
"""Largest integer that every JSON reader keeps exactly."""


def path_problem(path: str) -> str | None:
    """Why `path` may not be joined to a directory on some system, or None. Paths are relative, with `/`."""
    if not path:
        return "is empty"
    if any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in path):
        return "has a control character"
    if "\\" in path:
        return "has a backslash"
    if path.startswith("/") or _DRIVE.match(path):
        return "is absolute"
    if ":" in path:
        return "has a colon"
    if len(path.encode()) > 1024:
        return "is longer than 1024 bytes"
    for part in path.split("/"):
        if part in ("", "."):
            return "has an empty segment"
        if part == "..":
            return "leaves the artifact with '..'"
        if part != part.rstrip(". "):
            return "has a segment that ends in a dot or a space"
        if part.partition(".")[0].casefold() in _DEVICES:
            return "has a segment that Windows takes for a device"
    return None


def folded(path: str) -> str:
    """The form in which two paths are one file on a file system that ignores case or normalizes Unicode."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def clashes(paths: Iterable[str]) -> list[str]:
    """What cannot stand side by side: the same file twice (ignoring case), or a file that is also a directory."""
    problems, seen = [], dict[str, str]()
    for path in paths:
        if (key := folded(path)) in seen:
            problems.append(f"'{path}' is the same file as '{seen[key]}' where case is ignored")
        seen.setdefault(key, path)
    for key, path in seen.items():
        parts = key.split("/")
        parents = ("/".join(parts[:end]) for end in range(1, len(parts)))
        problems += [f"'{path}' lies in '{seen[parent]}', which is a file" for parent in parents if parent in seen]
    return problems


def payload_problem(path: str) -> str | None:
    """`path_problem`, for a file of the artifact: the manifest and the attestations are not listed."""
    top = folded(path.partition("/")[0])
    if top == ATTESTATIONS or folded(path) == MANIFEST:
        return "is a name that the artifact itself uses"
    return path_problem(path)


def digest_problem(digest: str) -> str | None:
    """Anything but `sha256:` and 64 lower-case hex digits."""
    return None if _DIGEST.fullmatch(digest) else "is not sha256:<64 lower-case hex digits>"


def size_problem(size: int) -> str | None:
    """Sizes are bytes."""
    return None if 0 <= size <= MAX_INT else "is not a size in bytes"


def text_problem(text: str) -> str | None:
    """Names and versions are one line, and not empty."""
    if not text.strip():
        return "is empty"
    return "has a control character" if any(unicodedata.category(char) in ("Cc", "Cs") for char in text) else None
