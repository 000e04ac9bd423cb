"""Compile a plan in a process of its own, arranged so that the same graph gives the same bytes.

TensorRT-RTX orders some of what it writes by the addresses of objects, and has threads that take memory side by side.
So the process runs on one core, without randomized addresses and with the same environment; it compiles in a thread,
whose heap does not know what Python has allocated before; and its threads are scheduled first in, first out, so that it
is not the clock that decides who comes first (see docs/decisions/tensorrt.md for what each of these is worth).

`python -P -m pipeline.stages.tensorrt.alone`, in a folder with job.json and model.onnx, writes plan and built.json
there. On standard output it says {"progress": [...]} a line, and at last {"error": {...}} or nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.errors import BY_EXIT_CODE, EnginewrightError, StageError
from pipeline.plain import from_plain, to_plain
from pipeline.stages.tensorrt import api as trt_api
from pipeline.stages.tensorrt.build import Build, Built, Profile, build
from pipeline.stages.tensorrt.flavours import flavour
from pipeline.step import Progress

_NO_RANDOMIZE = 0x0040000  # ADDR_NO_RANDOMIZE of <sys/personality.h>
_SETTLED = "ENGINEWRIGHT_SETTLED"
_HEAPS = "glibc.malloc.arena_max=512"
"""A heap for each thread, however many there are."""
_KEPT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "TMPDIR")
"""Variables that the process needs; all others could differ between two builds."""


def build_alone(
    name: str,
    onnx: Path,
    profiles: Sequence[Profile],
    options: Build,
    capabilities: Sequence[str],
    *,
    sparse: bool,
    progress: Progress,
) -> Built:
    """`trt_build.build` of the flavour `name` in such a process. Its errors, and StageError when the process dies."""
    with tempfile.TemporaryDirectory(prefix="enginewright-trt-") as scratch:
        place = Path(scratch)
        for path in onnx.parent.glob(f"{onnx.name}*"):
            (place / path.name).symlink_to(path.resolve())
        job = {
            "flavour": name,
            "onnx": onnx.name,
            "profiles": [dict(profile) for profile in profiles],
            "options": to_plain(options),
            "capabilities": list(capabilities),
            "sparse": sparse,
        }
        (place / "job.json").write_text(json.dumps(job), "utf-8")
        environment = {key: os.environ[key] for key in _KEPT if key in os.environ}
        root = str(Path(__file__).parents[3])
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
        command = [sys.executable, "-P", "-m", __spec__.name]
        child = subprocess.Popen(
            command, cwd=place, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
            env={**environment, "PYTHONHASHSEED": "0", "GLIBC_TUNABLES": _HEAPS},
        )  # fmt: skip
        error: dict[str, Any] | None = None
        try:
            assert child.stdout is not None
            for line in child.stdout:
                said = json.loads(line) if line.startswith("{") else {}
                if "progress" in said:
                    progress(*said["progress"])
                error = said.get("error", error)
        finally:
            child.kill()  # of a process that has ended, nothing; of one that is no longer wanted, the end
            child.wait()
        if error:
            raise BY_EXIT_CODE.get(error["exit_code"], StageError)(error["message"], hint=error["hint"])
        if not (place / "built.json").is_file():
            raise StageError(
                f"the process that compiles ended with code {child.returncode} and no plan",
                hint="see the step's log; a negative code is a signal: -9 is most often want of memory",
            )
        about = json.loads((place / "built.json").read_text("utf-8"))
        return Built((place / "plan").read_bytes(), about["network"], b"")


def main() -> int:
    """Settle, build, write. The exit code is the error's."""
    _settle()
    job = json.loads(Path("job.json").read_text("utf-8"))
    # The library writes to the process' standard output, too: ours goes through a copy that it does not know.
    speak = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def progress(done: float, total: float = 0, note: str = "") -> None:
        speak.write(json.dumps({"progress": [done, total, note]}) + "\n")

    try:
        trt = trt_api.load(job["flavour"])
        profiles = [{name: tuple(map(tuple, shapes)) for name, shapes in p.items()} for p in job["profiles"]]
        compiling = ThreadPoolExecutor(1).submit(
            build,
            trt,
            flavour(job["flavour"]),
            Path(job["onnx"]),
            profiles,  # type: ignore[arg-type]  # three shapes each: written by build_alone
            from_plain(Build, job["options"]),
            job["capabilities"],
            sparse=job["sparse"],
            progress=progress,
        )
        made = compiling.result()
    except EnginewrightError as error:
        detail = {"exit_code": error.exit_code, "message": error.message, "hint": error.hint}
        speak.write(json.dumps({"error": detail}) + "\n")
        return error.exit_code
    Path("plan").write_bytes(made.plan)
    Path("built.json").write_text(json.dumps({"network": made.network}), "utf-8")
    return 0


def _settle() -> None:
    """Start once more, settled, as far as the system lets us (Linux). A container may forbid to turn randomized
    addresses off, and one without CAP_SYS_NICE the order of threads."""
    if sys.platform != "linux" or os.environ.get(_SETTLED):
        return
    cores = os.sched_getaffinity(0)
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, {min(cores)})
    ctypes.CDLL(None).personality(_NO_RANDOMIZE)
    if len(cores) > 1:  # first in, first out leaves nothing of its core to others
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(os.sched_get_priority_min(os.SCHED_FIFO)))
    os.execve(sys.executable, [sys.executable, "-P", "-m", __spec__.name], {**os.environ, _SETTLED: "1"})


if __name__ == "__main__":
    sys.exit(main())
