"""The same bytes in the result of another step, without a copy where that is safe."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def share(source: Path, place: Path) -> None:
    """Give a file of an earlier result a second name, or copy it: a file that somebody can still write to, and what the
    file system cannot link."""
    if not source.stat().st_mode & 0o222:
        try:
            os.link(source, place)
        except OSError:
            pass
        else:
            return
    shutil.copyfile(source, place)
