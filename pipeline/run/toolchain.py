"""Toolchains: interpreters by name, each with its own locked requirements: not all packages install together."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline import installed
from pipeline.errors import StageError, UnavailableError
from pipeline.places import toolchain_home, toolchain_python
from pipeline.tables import DATA

LOCKS = DATA / "toolchains"


def interpreter(name: str, configured: Mapping[str, str]) -> str:
    """The Python of a toolchain: the recipe's `toolchains`, `$ENGINEWRIGHT_TOOLCHAIN_<NAME>`, or the installed one.

    Raises UnavailableError when there is none.
    """
    if name == "default":
        return sys.executable
    python, variable = toolchain_python(name, configured)
    if not python.is_file():
        raise UnavailableError(
            f"the toolchain {name!r} is not installed (looked for {python})",
            hint=f"`enginewright toolchain install {name}`, or set {variable} to an interpreter",
        )
    return str(python)


@functools.lru_cache
def _site_packages(python: str) -> tuple[str, ...]:
    found = (Path(python).parent.parent / "lib").glob("python3*/site-packages")
    return tuple(str(path) for path in sorted(found))


def version(distribution: str, toolchain: str, configured: Mapping[str, str]) -> str:
    """The installed version of a distribution in a toolchain, read from its metadata: nothing is imported."""
    path = None if toolchain == "default" else _site_packages(interpreter(toolchain, configured))
    if (found := installed.version(distribution, path)) is None:
        where = "" if toolchain == "default" else f" in the toolchain {toolchain!r}"
        raise UnavailableError(f"the package {distribution!r} is not installed{where}")
    return found


def names() -> list[str]:
    """Toolchains that can be installed."""
    return sorted(path.stem for path in LOCKS.glob("*.txt"))


def install(name: str) -> Path:
    """Create a toolchain from its locked requirements; returns its interpreter."""
    if name not in names():
        raise UnavailableError(f"no toolchain is called {name!r}", hint=f"one of: {', '.join(names())}")
    place = toolchain_home(name)
    python = place / "bin" / "python"
    requirements = LOCKS / f"{name}.txt"
    for command in (
        [sys.executable, "-m", "venv", str(place)],
        # torch first and alone: asked for by another package it may come with gigabytes of CUDA.
        [str(python), "-m", "pip", "install", "--quiet", *_pinned(requirements, "torch")],
        [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", str(requirements)],
    ):
        if subprocess.run(command, check=False).returncode:
            raise StageError(f"`{' '.join(command)}` failed", hint="its output is above; run it again when mended")
    return python


def _pinned(requirements: Path, name: str) -> list[str]:
    lines = [line.strip() for line in requirements.read_text("utf-8").splitlines()]
    return [line for line in lines if line.startswith(f"{name}==")] or ["pip"]
