"""What the machine's memory gives: the roofline under which every token reads all weights once."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

_BYTES = 256 << 20
_TURNS = 5


def bandwidth_bytes_s(threads: int = 0) -> float:
    """How many bytes a second all cores read from memory together: the best of some turns over 256 MiB."""
    import numpy as np

    count = threads or len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(_BYTES // 8), count)
    with ThreadPoolExecutor(count) as pool:
        best = 0.0
        for _ in range(_TURNS):
            started = time.perf_counter()
            list(pool.map(np.sum, parts))  # numpy lets the others run meanwhile
            best = max(best, _BYTES / (time.perf_counter() - started))
    return best
