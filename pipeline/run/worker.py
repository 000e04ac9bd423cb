"""The child process of one step: `python -m pipeline.run.worker job.json`. Imports the standard library and the stage.

job.json: {"stage": "module:CONSTANT", "options_type": "module:Class", "options": {...}, "inputs": {role: directory},
"out": directory}. Messages are JSON lines on the file descriptor of `--messages` (standard output without it):
{"progress": [done, total, note]}, or {"error": {exit_code, message, hint}}.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import EnginewrightError, StageError
from pipeline.plain import from_plain
from pipeline.step import Stage

FULL = (errno.ENOSPC, errno.EDQUOT)


def main(argv: list[str] | None = None) -> int:
    """Run one job; the exit code is the error's."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.run.worker", description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("--messages", type=int, default=1, help="file descriptor for progress and errors")
    parser.add_argument("--parent", type=int, default=0, help="process id to die with")
    arguments = parser.parse_args(argv)
    if arguments.parent:
        _die_with(arguments.parent)
    job = json.loads(arguments.job.read_text("utf-8"))
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    with os.fdopen(arguments.messages, "w", buffering=1, encoding="utf-8", closefd=False) as messages:
        try:
            _run(job, out, messages)
        except EnginewrightError as error:
            return _fail(messages, error)
        except MemoryError:
            return _fail(messages, StageError("out of memory", hint="build on a machine with more memory"))
        except Exception as error:
            # By its words too, for a library swallows the errno. Nothing is printed: the log lies on the full disk.
            if getattr(error, "errno", 0) in FULL or "No space left on device" in str(error):
                return _fail(messages, no_space(out, job))
            traceback.print_exc()
            return _fail(messages, StageError(f"{type(error).__name__}: {error}"))
    return 0


def _run(job: dict[str, Any], out: Path, messages: TextIO) -> None:
    stage: Stage[Any] = load(job["stage"])
    options = from_plain(load(job["options_type"]), job["options"])
    inputs = {role: Path(path) for role, path in job["inputs"].items()}

    def progress(done: float, total: float = 0, note: str = "") -> None:
        with contextlib.suppress(OSError):
            messages.write(json.dumps({"progress": [done, total, note]}) + "\n")

    stage.run(inputs, options, out, progress)
    if not any(out.iterdir()):
        raise StageError(f"the stage {stage.name} wrote nothing")


def load(reference: str) -> Any:
    """`package.module:Name` -> the object."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def no_space(out: Path, job: dict[str, Any]) -> StageError:
    """The error for a full disk: where, what is free, what the step had written and what it reads."""
    written = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    reads = sum(f.stat().st_size for role in job["inputs"].values() for f in Path(role).rglob("*") if f.is_file())
    need = max(reads, written) + written
    return StageError(
        f"no space left on the disk of {out}: {shutil.disk_usage(out).free / 1e6:.1f} MB free, this step had written "
        f"{written / 1e6:.1f} MB and needs about {need / 1e6:.1f} MB",
        hint="free some space (`enginewright cache gc`), or give another place with --cache DIR",
    )


def _fail(messages: TextIO, error: EnginewrightError) -> int:
    with contextlib.suppress(OSError):
        detail = {"exit_code": error.exit_code, "message": error.message, "hint": error.hint}
        messages.write(json.dumps({"error": detail}) + "\n")
    return error.exit_code


def _die_with(parent: int) -> None:
    """Ask the kernel to end this process when the builder is killed, so that no orphan works on (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    code = main()
    gc.freeze()  # or the interpreter looks for garbage among the million objects of torch as it ends: 1.2 CPU s
    sys.exit(code)
