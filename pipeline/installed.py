"""What is installed: versions and entry points, by the folders of metadata beside the packages.

importlib.metadata knows more, but it imports the parsers of mail and zip files and reads every folder for every
question: a fifth of the time of a build that has all its results in the store. What is not found here, it is asked.
"""

from __future__ import annotations

import functools
import importlib
import operator
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

SUFFIX = ".dist-info"


def version(distribution: str, path: Sequence[str] | None = None) -> str | None:
    """The version of a distribution in the folders of `path` (None: of this interpreter); None when it is not there."""
    if not (wanted := _normal(distribution)):
        return None  # importlib.metadata would take the first that it finds
    for folder in sys.path if path is None else path:
        if found := _folders(folder).get(wanted):
            return found.removesuffix(SUFFIX).partition("-")[2]
    import importlib.metadata

    places = list(sys.path if path is None else path)
    return next((each.version for each in importlib.metadata.distributions(name=distribution, path=places)), None)


@functools.cache
def entry_points(group: str) -> dict[str, str]:
    """name -> `module` or `module:attribute`, of every distribution of this interpreter; the first on the path wins."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    for folder in sys.path:
        for name, metadata in _folders(folder).items():
            if name not in seen:
                seen.add(name)
                found = _points(os.path.join(folder, metadata, "entry_points.txt"), group) | found  # noqa: PTH118
    return found


def load(point: str) -> Any:
    """What an entry point names. Raises ImportError or AttributeError."""
    module, _, attribute = point.partition(":")
    loaded = importlib.import_module(module)
    return operator.attrgetter(attribute)(loaded) if attribute else loaded


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@functools.cache
def _folders(place: str) -> dict[str, str]:
    """Normalized name -> the folder of its metadata, of the distributions in a folder of the path."""
    try:
        names = sorted(name for name in os.listdir(place or ".") if name.endswith(SUFFIX))  # noqa: PTH208  a Path a name costs
    except OSError:  # a zip file, or a folder that is not there
        return {}
    return {_normal(name.partition("-")[0]): name for name in names if "-" in name.removesuffix(SUFFIX)}


def _points(file: str, group: str) -> dict[str, str]:
    """The entries of one group of an entry_points.txt; {} where there is none that can be read."""
    try:
        with open(file, encoding="utf-8") as stream:  # noqa: PTH123
            text = stream.read()
    except (OSError, UnicodeDecodeError):
        return {}
    found: dict[str, str] = {}
    section = ""
    for line in text.splitlines() if group in text else ():
        line = line.strip()
        if line.startswith("["):
            section = line.strip("[] ")
        elif section == group and "=" in line and not line.startswith(("#", ";")):
            name, _, value = line.partition("=")
            found[name.strip()] = value.partition("[")[0].strip()
    return found
