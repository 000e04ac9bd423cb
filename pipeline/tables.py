"""The tables in data/: what differs by model family, precision, machine or server, as TOML."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"


@functools.cache
def table(name: str) -> dict[str, Any]:
    """data/<name>.toml, read once a process: whoever changes it changes it for all."""
    return tomllib.loads((DATA / f"{name}.toml").read_text("utf-8"))
