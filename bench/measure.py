"""Run a command and measure its whole process tree: CPU seconds, wall seconds, peak memory; and what it left on disk.

Only the standard library, and little of it: the kernel counts the pages of the process that forks to the child's peak,
so a heavy harness would add to every figure.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What one command took. CPU is user + system of the process and of all its children that it waited for."""

    cpu_s: float
    wall_s: float
    peak_bytes: int
    """Of the largest process of the tree."""
    exit_code: int

    def __add__(self, other: Cost) -> Cost:
        """Two commands, one after the other."""
        return Cost(
            self.cpu_s + other.cpu_s,
            self.wall_s + other.wall_s,
            max(self.peak_bytes, other.peak_bytes),
            self.exit_code or other.exit_code,
        )


def run(command: Sequence[str], *, cwd: Path, environment: Mapping[str, str], log: Path) -> Cost:
    """Run to the end; output goes to `log`. A failure is a measurement too: it is in `exit_code`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as handle:
        started = time.monotonic()
        child = subprocess.Popen(
            list(command), cwd=cwd, env=dict(environment), stdin=subprocess.DEVNULL, stdout=handle, stderr=handle
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    return Cost(
        cpu_s=usage.ru_utime + usage.ru_stime,
        wall_s=time.monotonic() - started,
        peak_bytes=usage.ru_maxrss * 1024,
        exit_code=child.returncode,
    )


def blocks(folders: Iterable[Path]) -> dict[tuple[int, int], int]:
    """Bytes in use below the folders, by file: one under several names (hard links) is one file."""
    seen: dict[tuple[int, int], int] = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                stat = path.stat()
                seen[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return seen


def disk_bytes(folders: Iterable[Path], beside: Iterable[Path] = ()) -> int:
    """Blocks in use below the folders. What lies `beside` under another name, the model itself, takes no room here."""
    foreign = blocks(beside).keys()
    return sum(size for file, size in blocks(folders).items() if file not in foreign)


def median(costs: Sequence[Cost]) -> dict[str, Any]:
    """The median of each figure, with the smallest and the largest; exit codes as they were."""
    figures: dict[str, Any] = {"runs": len(costs), "exit_codes": sorted({cost.exit_code for cost in costs})}
    for name in ("cpu_s", "wall_s", "peak_bytes"):
        values = [asdict(cost)[name] for cost in costs]
        figures[name] = statistics.median(values)
        figures[f"{name}_range"] = [min(values), max(values)]
    return figures
