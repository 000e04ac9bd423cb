"""One step as a child process: started, listened to, measured, and told apart when it fails."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import pipeline
from pipeline.errors import BY_EXIT_CODE, StageError
from pipeline.plain import to_plain
from pipeline.plan import PlannedStep
from pipeline.run.toolchain import interpreter
from pipeline.step import Stage

WORKER = ("-P", "-m", "pipeline.run.worker")
"""-P: what lies in the working directory, `pipeline/` or `numpy.py`, is the user's and none of the worker's modules."""
ROOT = str(Path(pipeline.__file__).parents[1])
RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes of one unit of ru_maxrss."""
Cost = dict[str, Any]
"""wall_s, cpu_s (user and system), peak_rss_bytes."""


@dataclass
class Children:
    """The child processes of a run; `stop` kills them, and those that would start after it."""

    logs: Path
    toolchains: Mapping[str, str]
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _stopped: bool = False
    _lock: Lock = field(default_factory=Lock)

    def run(
        self,
        step: PlannedStep,
        inputs: Mapping[str, Path],
        out: Path,
        progress: Callable[[list[Any]], None],
        threads: int = 1,
    ) -> Cost:
        """Run the step's stage; what it cost. Raises its error, with the command that repeats it."""
        self.logs.mkdir(exist_ok=True)
        log, kept, live = self.logs / f"{step.key}.log", self.logs / f"{step.key}.job.json", out.parent / "job.json"
        job = {
            "stage": reference(step.stage),
            "options_type": f"{type(step.options).__module__}:{type(step.options).__qualname__}",
            "options": to_plain(step.options),
            "inputs": {role: str(path) for role, path in inputs.items()},
        }
        # The kept job writes beside the log, so that repeating a failure by hand never meets the store.
        kept.write_text(json.dumps({**job, "out": str(self.logs / f"{step.key}.out")}, indent=1), "utf-8")
        live.write_text(json.dumps({**job, "out": str(out)}), "utf-8")
        command = [interpreter(step.stage.toolchain, self.toolchains), *WORKER]
        started = time.monotonic()
        child, messages = self._start([*command, str(live)], log, _environment(step, threads))
        Thread(target=_sweep, args=(child.pid,), daemon=True).start()
        error = _listen(messages, progress)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        with self._lock:
            self._running.discard(child)
        live.unlink(missing_ok=True)
        if child.returncode == 0 and error is None:
            kept.unlink(missing_ok=True)
            return {
                "wall_s": round(time.monotonic() - started, 3),
                "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
                "peak_rss_bytes": usage.ru_maxrss * RSS_UNIT,
            }
        found = "" if step.stage.toolchain == "default" else f"PYTHONPATH={shlex.quote(ROOT)} "
        again = f"repeat it with: {found}{shlex.join([*command, str(kept)])}\nlog: {log}{_limited()}"
        if error is None:
            raise StageError(f"{step.label}: {_death(child.returncode, usage.ru_maxrss * RSS_UNIT)}", hint=again)
        kind = BY_EXIT_CODE.get(int(error["exit_code"]), StageError)
        hint = f"{error['hint']}\n{again}" if error["hint"] else again
        raise kind(f"{step.label}: {error['message']}", hint=hint)

    def _start(
        self, command: list[str], log: Path, environment: Mapping[str, str]
    ) -> tuple[subprocess.Popen[bytes], int]:
        """The process and the file descriptor on which it speaks."""
        read, write = os.pipe()
        with log.open("wb") as handle:
            child = subprocess.Popen(
                [*command, "--messages", str(write), "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
                pass_fds=[write],
                env=environment,
                start_new_session=True,
            )
        os.close(write)
        with self._lock:
            self._running.add(child)
            if self._stopped:
                child.kill()
        return child, read

    def stop(self) -> None:
        """Kill every child."""
        with self._lock:
            self._stopped = True
            for child in self._running:
                child.kill()


def _environment(step: PlannedStep, threads: int) -> dict[str, str]:
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads burn the time of working ones on a busy machine
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONPATH": os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if step.needs:  # only a step that rests on nothing may use the network
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return environment


def _sweep(pid: int) -> None:
    """Kill what a child leaves behind when it ends: it would hold our pipe open, and nobody waits for its results."""
    with contextlib.suppress(OSError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        os.killpg(pid, signal.SIGKILL)


def _listen(messages: int, progress: Callable[[list[Any]], None]) -> dict[str, Any] | None:
    """Pass progress on until the child has closed its end; the error that it told, if any."""
    error = None
    with os.fdopen(messages, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                continue  # cut short by a crash
            if "progress" in message:
                progress(message["progress"])
            error = message.get("error", error)
    return error


def reference(stage: Stage[Any]) -> str:
    """`module:CONSTANT` under which a child process finds the stage."""
    module = stage.run.__module__
    for name, value in vars(sys.modules[module]).items():
        if value is stage:
            return f"{module}:{name}"
    raise TypeError(f"the stage {stage.name} is not a constant of {module}")


def _death(code: int, peak_bytes: int) -> str:
    if code >= 0:
        return f"the process ended with exit code {code} and no message"
    name = signal.Signals(-code).name
    peak = f"it held {peak_bytes / 1e6:.0f} MB"
    why = f" (killed from outside; the usual reason is that memory ran out: {peak})" if name == "SIGKILL" else ""
    return f"the process died of {name}{why}"


def _limited() -> str:
    """A line on a limit of memory, at which libraries fail in many ways of which few speak of memory."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return ""
    return f"\nthis shell limits the memory of a process to {limit / 1e6:.0f} MB (`ulimit -v`): that may be the reason"
