"""Where the store and the toolchains are on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import UnavailableError


def default_root() -> Path:
    """`$ENGINEWRIGHT_CACHE`, else `$XDG_CACHE_HOME/enginewright`, else `~/.cache/enginewright`."""
    if root := os.environ.get("ENGINEWRIGHT_CACHE"):
        return Path(root).absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "enginewright"
    except RuntimeError:  # a container with a bare user number
        raise UnavailableError("this user has no home directory", hint="set ENGINEWRIGHT_CACHE to a folder") from None


def toolchain_home(name: str) -> Path:
    """Where `toolchain install` puts a toolchain."""
    return default_root() / "toolchains" / name


def toolchain_python(name: str, configured: Mapping[str, str]) -> tuple[Path, str]:
    """(the Python of a toolchain, the variable that may name it): the recipe's `toolchains`,
    `$ENGINEWRIGHT_TOOLCHAIN_<NAME>`, or where it would be installed. Whether it is there is not asked."""
    variable = f"ENGINEWRIGHT_TOOLCHAIN_{name.upper().replace('-', '_')}"
    found = configured.get(name) or os.environ.get(variable) or toolchain_home(name) / "bin" / "python"
    return Path(found), variable
