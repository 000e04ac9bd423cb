"""Describe the machine and the commands of a benchmark without naming either: no host, no user, no path."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimddp", "i8mm", "sve")


def describe() -> dict[str, object]:
    """Operating system, architecture, processors and memory."""
    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo.read_text("utf-8"), re.MULTILINE)
        flags = set(found[1].split()) if found else set()
    return {
        "os": platform.system(),
        "arch": platform.machine(),
        "processors": os.cpu_count(),
        "isa": [name for name in ISA if name in flags],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
    }


def load() -> float:
    """How many processes wanted a processor, averaged over a minute."""
    return round(os.getloadavg()[0], 1)


def shown(command: Sequence[str]) -> str:
    """A command as the page shows it: programs by name, inputs relative to the repository."""
    words = [str(word).replace(f"{ROOT}{os.sep}", "") for word in command]
    program = Path(words[0]).name
    return " ".join([re.sub(r"^python[\d.]*$", "python", program), *words[1:]])
