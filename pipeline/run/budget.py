"""What a build may take of this machine: steps side by side, bytes of memory, threads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.frozen import frozen
from pipeline.hardware import Hardware, free_memory

SHARE = 0.9
"""Of the memory that is free when a build begins: the rest is for the page cache and for neighbours that grow."""


@frozen
class Budget:
    """Limits of a build. Zero bytes mean that no limit is known."""

    jobs: int = 1
    """Steps side by side."""
    cores: int = 1
    memory_bytes: int = 0

    def threads(self, steps: int) -> int:
        """Threads of each of so many steps at once."""
        return max(1, self.cores // max(1, steps))

    def admits(self, need_bytes: int, running: Mapping[str, int]) -> bool:
        """Whether a step may begin beside those that run (key -> need, bytes). A step alone always may."""
        if not running:
            return True
        fits = not self.memory_bytes or need_bytes + sum(running.values()) <= self.memory_bytes
        return fits and len(running) < self.jobs


def of_host(host: Hardware, jobs: int | None = None, memory_bytes: int | None = None, threads: str = "") -> Budget:
    """The budget of this machine: its cores and what is free of its memory, each within the limits of the cgroup.

    `jobs` and `memory_bytes` are what the user said; `threads` is $OMP_NUM_THREADS, which may say less than the cores.
    """
    cores = max(1, host.cores)
    told = threads.partition(",")[0].strip()
    return Budget(
        jobs=jobs or cores,
        cores=min(cores, int(told)) if told.isdigit() and int(told) else cores,
        memory_bytes=int(free_memory(Path("/")) * SHARE) if memory_bytes is None else memory_bytes,
    )
