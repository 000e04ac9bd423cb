"""Stages that do little, for tests of the spine; imported by name in the worker process."""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UnavailableError
from pipeline.step import Inputs, Progress, Stage


@dataclass(frozen=True, kw_only=True)
class Write:
    """Write `text`, after what the inputs hold."""

    text: str = ""
    sleep_s: float = 0.0
    fail: str = ""
    threads: bool = False
    """Write how many threads the step may use, too."""


def write(inputs: Inputs, options: Write, out: Path, progress: Progress) -> None:
    """Concatenate; or fail in the way that was asked."""
    progress(1, 2, "half-way")
    (out / "partial").write_text("not whole")
    time.sleep(options.sleep_s)
    if options.fail == "orphan" and os.fork() == 0:
        time.sleep(30)
    if options.fail in ("kill", "orphan"):
        os.kill(os.getpid(), signal.SIGKILL)
    if options.fail == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if options.fail == "hidden enospc":
        raise RuntimeError("write failed: No space left on device")
    if options.fail == "enospc":
        raise OSError(errno.ENOSPC, "No space left on device")
    if options.fail == "unavailable":
        raise UnavailableError("this needs a thing", hint="get the thing")
    if options.fail == "bug":
        raise ZeroDivisionError("a bug")
    (out / "partial").unlink()
    if options.threads:
        (out / "threads").write_text(os.environ["OMP_NUM_THREADS"])
    before = "".join((folder / "text").read_text() for _, folder in sorted(inputs.items()))
    (out / "text").write_text(before + options.text)


def differ(inputs: Inputs, options: Write, out: Path, progress: Progress) -> None:
    """Other bytes each time: what no stage should do, and one may."""
    (out / "text").write_text(os.urandom(8).hex())


WRITE = Stage("test.write", write)
DIFFER = Stage("test.differ", differ)
TOOLED = Stage("test.tooled", write, tools=("click",))
ON_DEVICE = Stage("test.on_device", write, scope="device")
