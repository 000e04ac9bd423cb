"""Nothing of the machine that built it may be in a manifest: no absolute path, home directory, user name or time."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError

_PATH_AT_START = re.compile(r"(file:/|/[^/\s]|~[\w.-]*/|[A-Za-z]:[\\/]|\\\\[\w.-]+\\)")
_PATH_INSIDE = re.compile(r"(?:^|[\s='\"(,;])(/[^/\s'\"]+/[^\s'\"]*|~[\w.-]*/\S*|[A-Za-z]:\\\S*|file:/\S+)")
_TIME = re.compile(r"\b\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}")
_URI = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://")
_GRAPH_NAMES = re.compile(r"node|tensor|layer|module|initializer|op_?name")
"""Fields that hold names of a graph: exporters write them as `/model/layers.0/mlp/MatMul`, which is no path."""
_GIVEN = re.compile(
    r"\$\.(files\[\d+\]\.(path|media_type)|sources\[\d+\]\.files\[\d+\]\.path|stages\[\d+\]\.outputs|runtime\.entry|interface\.)"
)
"""Places filled by the engine's and the model's own file and tensor names."""


def check_clean(manifest: Any, *, home: Path | None = None, user: str | None = None) -> None:
    """Refuse a manifest (plain JSON values) that tells of the builder's machine. Raises RecipeError, all at once.

    `home` and `user` are this process's own by default. A user name counts only as part of a path or an address
    (`alice/models`, `alice@host`): alone it may be an honest word.
    """
    home_text = str(home or _home() or "")
    in_home = re.compile(rf"{re.escape(home_text)}(/|\b)") if len(home_text) > 1 else None
    user = _login() if user is None else user
    who = re.compile(rf"(^|[/\\~\s]){re.escape(user)}[/\\@]|[/\\~]{re.escape(user)}$") if user else None
    problems = []
    for where, text in _texts(manifest, "$"):
        if in_home and in_home.search(text):
            problems.append(f"{where}: {text!r:.200} holds the home directory")
        elif _graph_name(where):
            continue
        elif _PATH_AT_START.match(text) or _PATH_INSIDE.search(text):
            problems.append(f"{where}: {text!r:.200} holds an absolute path")
        elif who and who.search(text) and not _URI.match(text) and not _GIVEN.match(where):
            problems.append(f"{where}: {text!r:.200} holds the user's name")
        elif _TIME.search(text):
            problems.append(f"{where}: {text!r:.200} holds a time")
    if problems:
        raise RecipeError(
            "the manifest would tell of this machine, and differ on the next:"
            + "".join(f"\n  {problem}" for problem in problems),
            hint="give paths relative to the recipe; anything else here is a fault of the target: report it",
        )


def _home() -> Path | None:
    """This process's home directory; None where the user has none."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def _login() -> str:
    """The name of this process's user; empty where the system knows none (a container with a bare number)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


def _graph_name(where: str) -> bool:
    return bool(_GRAPH_NAMES.search(where.rpartition(".")[2])) or where.startswith("$.interface.")


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield f"{where} (a name)", name
            yield from _texts(item, f"{where}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{where}[{index}]")
    elif isinstance(value, str):
        yield where, value
