"""Run a plan on this machine: every missing step in a child process, independent steps side by side."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipeline
from pipeline.errors import BY_EXIT_CODE, EnginewrightError, StageError
from pipeline.plain import to_plain
from pipeline.plan import Plan, PlannedStep
from pipeline.run.toolchain import interpreter
from pipeline.step import Stage
from pipeline.store import Entry, Store

Event = Mapping[str, Any]
"""{"event": "start" | "progress" | "done" | "hit" | "failed", "step": label, "key": key, ...}"""


@dataclass
class Runner:
    """Where and how steps run. `on_event` is called from several threads, one at a time."""

    store: Store
    on_event: Callable[[Event], None]
    toolchains: Mapping[str, str]
    jobs: int = 1

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, plan: Plan) -> dict[str, Entry]:
        """Results by key. The first failure ends the run: steps under way are stopped, finished ones are kept."""
        done: dict[str, Entry] = {}
        waiting = list(plan.steps)
        running: dict[Future[Entry], str] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                while waiting or running:
                    ready = [step for step in waiting if all(key in done for key in step.needs.values())]
                    for step in ready[: max(0, self.jobs - len(running))]:
                        waiting.remove(step)
                        inputs = {role: done[key].out for role, key in step.needs.items()}
                        running[pool.submit(self._step, step, inputs)] = step.key
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        done[running.pop(future)] = future.result()
            except BaseException:
                self._stop()
                raise
        return done

    def _step(self, step: PlannedStep, inputs: Mapping[str, Path]) -> Entry:
        if entry := self.store.get(step.key):
            self._tell("hit", step, size_bytes=entry.size_bytes)
            return entry
        run: dict[str, Any] = {}
        try:
            with self.store.locked(step.key):
                if entry := self.store.get(step.key):  # another builder was here first
                    self._tell("hit", step, size_bytes=entry.size_bytes)
                    return entry
                if why := self.store.corrupt.get(step.key):
                    self._tell("corrupt", step, reason=why)
                self._tell("start", step)
                with self.store.adding(step.key, dict(step.key_text), run) as out:
                    run.update(self._child(step, inputs, out))
        except OSError as error:
            failure = StageError(f"{step.label}: {error.strerror} ({error.filename or self.store.root})")
            self._tell("failed", step, message=str(failure))
            raise failure from error
        except EnginewrightError as error:
            self._tell("failed", step, message=str(error))
            raise
        entry = self.store.get(step.key)
        if entry is None:
            raise StageError(f"{step.label}: its result vanished: {self.store.corrupt.get(step.key, 'removed')}")
        self._tell("done", step, size_bytes=entry.size_bytes, **run)
        return entry

    def _child(self, step: PlannedStep, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
        """Run the step's stage; what it cost. Raises its error, with the command that repeats it."""
        logs = self.store.root / "logs"
        logs.mkdir(exist_ok=True)
        log, job = logs / f"{step.key}.log", logs / f"{step.key}.job.json"
        described = {
            "stage": _reference(step.stage),
            "options_type": f"{type(step.options).__module__}:{type(step.options).__qualname__}",
            "options": to_plain(step.options),
            "inputs": {role: str(path) for role, path in inputs.items()},
        }
        # The kept job writes beside the log, so that repeating a failure by hand never meets the store.
        job.write_text(json.dumps({**described, "out": str(logs / f"{step.key}.out")}, indent=1), "utf-8")
        live = out.parent / "job.json"
        live.write_text(json.dumps({**described, "out": str(out)}), "utf-8")
        python = interpreter(step.stage.toolchain, self.toolchains)
        command = [python, "-m", "pipeline.run.worker"]
        read, write = os.pipe()
        started = time.monotonic()
        with log.open("wb") as handle:
            child = subprocess.Popen(
                [*command, str(live), "--messages", str(write), "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
                pass_fds=[write],
                env=self._environment(step),
                start_new_session=True,
            )
        os.close(write)
        with self._lock:
            self._children.add(child)
            if self._stopped:
                child.kill()
        error = self._listen(step, read)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        with self._lock:
            self._children.discard(child)
        live.unlink(missing_ok=True)
        if child.returncode == 0 and error is None:
            job.unlink(missing_ok=True)
            return {
                "wall_s": round(time.monotonic() - started, 3),
                "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
                "peak_rss_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            }
        again = f"repeat it with: {shlex.join([*command, str(job)])}\nlog: {log}"
        if error is None:
            raise StageError(f"{step.label}: {_death(child.returncode)}", hint=again)
        kind = BY_EXIT_CODE.get(int(error["exit_code"]), StageError)
        hint = f"{error['hint']}\n{again}" if error["hint"] else again
        raise kind(f"{step.label}: {error['message']}", hint=hint)

    def _listen(self, step: PlannedStep, read: int) -> dict[str, Any] | None:
        error = None
        with os.fdopen(read, encoding="utf-8", errors="replace") as messages:
            for line in messages:
                try:
                    message = json.loads(line)
                except ValueError:
                    continue  # cut short by a crash
                if "progress" in message:
                    done, total, note = message["progress"]
                    self._tell("progress", step, done=done, total=total, note=note)
                error = message.get("error", error)
        return error

    def _environment(self, step: PlannedStep) -> dict[str, str]:
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        environment = {
            **os.environ,
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DO_NOT_TRACK": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(Path(pipeline.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        }
        if step.needs:  # only a step that rests on nothing may use the network
            environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        return environment

    def _tell(self, event: str, step: PlannedStep, **more: Any) -> None:
        with self._lock:
            self.on_event({"event": event, "step": step.label, "key": step.key, **more})

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for child in self._children:
                child.kill()


def _reference(stage: Stage[Any]) -> str:
    """`module:CONSTANT` under which a child process finds the stage."""
    module = stage.run.__module__
    for name, value in vars(sys.modules[module]).items():
        if value is stage:
            return f"{module}:{name}"
    raise TypeError(f"the stage {stage.name} is not a constant of {module}")


def _death(code: int) -> str:
    if code >= 0:
        return f"the process ended with exit code {code} and no message"
    name = signal.Signals(-code).name
    why = " (killed from outside; the usual reason is that memory ran out)" if name == "SIGKILL" else ""
    return f"the process died of {name}{why}"
