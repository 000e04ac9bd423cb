"""The child process of `verify --run`: `python -m pipeline.artifact.run_golden ARTIFACT RESULT`.

Opens the artifact with its own runtime, gives it the golden inputs, and writes {"report": {metrics, worst, samples},
"timing": {...}} or {"error": {exit_code, message, hint}} to RESULT. A native library that crashes takes only this
process with it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import hardware, targets
from pipeline.artifact import paths
from pipeline.artifact.manifest import freeze
from pipeline.artifact.read import load
from pipeline.engine import Array, Engine, Sampling, Token
from pipeline.errors import EnginewrightError, StageError, UnavailableError, VerificationError

OpenEngine = Callable[[Path], Engine]


def main(argv: list[str]) -> int:
    """Judge one artifact; the exit code is the error's."""
    artifact, result = Path(argv[0]), Path(argv[1])
    try:
        clock = Clock(opener(artifact))
        result.write_text(json.dumps({"report": judge(artifact, clock.open), "timing": clock.timing()}), "utf-8")
    except EnginewrightError as error:
        return _fail(result, error)
    except MemoryError:
        return _fail(result, StageError("out of memory", hint="run it on a machine with more memory"))
    return 0  # any other exception ends the process with its traceback, which the parent shows


class Clock:
    """Opens an engine that notes how long it takes: to open, and for each forward pass."""

    def __init__(self, open_engine: OpenEngine) -> None:
        self._open = open_engine
        self.open_s = 0.0
        self.runs_s: list[float] = []

    def open(self, path: Path) -> Engine:
        """The engine, timed."""
        started = time.perf_counter()
        engine = self._open(path)
        self.open_s += time.perf_counter() - started
        return _Timed(engine, self.runs_s)

    def timing(self) -> dict[str, float]:
        """What was noted, in seconds; of the passes the first is apart, as many engines prepare in it."""
        first, *rest = self.runs_s or [0.0]
        found = {"open_s": self.open_s, "runs": len(self.runs_s), "first_run_s": first}
        if rest:
            found |= {"run_s_median": statistics.median(rest), "run_s_min": min(rest), "run_s_max": max(rest)}
        return found


class _Timed:
    """An engine whose forward passes are timed; all else is the engine's own."""

    def __init__(self, engine: Engine, runs_s: list[float]) -> None:
        self._engine = engine
        self._runs_s = runs_s

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        started = time.perf_counter()
        try:
            return self._engine.run(inputs)
        finally:
            self._runs_s.append(time.perf_counter() - started)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Token]:
        return self._engine.generate(prompts, sampling)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def opener(artifact: Path) -> OpenEngine:
    """How the artifact's runtime opens it here. UnavailableError when this machine cannot run it."""
    manifest, _ = load(artifact)
    target = targets.load(manifest.runtime.engine)
    here = hardware.probe()
    able = target.can_run(freeze(manifest), here)
    if not able.ok:
        raise UnavailableError(
            f"this machine cannot run {artifact}: {able.reason}",
            hint=f"it is built for {manifest.target.name}: run this command on such a machine",
        )

    def open_engine(path: Path) -> Engine:
        try:
            return target.open(path, here)
        except ImportError as error:
            raise missing(manifest.runtime.engine, target.EXTRA, error) from error

    return open_engine


def missing(runtime: str, extra: str, error: ImportError) -> UnavailableError:
    """The error for a runtime whose package is not installed."""
    hint = f"pip install 'enginewright[{extra}]'" if extra else "install it, and run this command again"
    return UnavailableError(f"the runtime {runtime!r} is not installed here: {error}", hint=hint)


def judge(artifact: Path, open_engine: OpenEngine) -> dict[str, Any]:
    """The parity report of an artifact on its golden inputs: metrics, worst, samples.

    VerificationError when it carries none, UnavailableError when the runtime's package is not installed.
    """
    golden = artifact / paths.GOLDEN
    if not golden.is_dir():
        raise VerificationError(
            f"{artifact} carries no golden inputs", hint="only a target that measures parity adds them to its artifacts"
        )
    from pipeline.stages.golden import judge_golden

    manifest, _ = load(artifact)
    accepts = {tensor.name for tensor in manifest.interface.inputs} or None
    return judge_golden(golden, open_engine(artifact), accepts)


def _fail(result: Path, error: EnginewrightError) -> int:
    detail = {"exit_code": error.exit_code, "message": error.message, "hint": error.hint}
    result.write_text(json.dumps({"error": detail}), "utf-8")
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
