"""The child process of `verify --run`: `python -m pipeline.artifact.run_golden ARTIFACT RESULT`.

Opens the artifact with its own runtime, gives it the golden inputs, and writes {"report": {metrics, worst, samples}}
or {"error": {exit_code, message, hint}} to RESULT. A native library that crashes takes only this process with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import hardware, targets
from pipeline.artifact import paths
from pipeline.artifact.manifest import freeze
from pipeline.artifact.read import load
from pipeline.engine import Engine
from pipeline.errors import EnginewrightError, StageError, UnavailableError, VerificationError

OpenEngine = Callable[[Path], Engine]


def main(argv: list[str]) -> int:
    """Judge one artifact; the exit code is the error's."""
    artifact, result = Path(argv[0]), Path(argv[1])
    try:
        result.write_text(json.dumps({"report": judge(artifact, opener(artifact))}), "utf-8")
    except EnginewrightError as error:
        return _fail(result, error)
    except MemoryError:
        return _fail(result, StageError("out of memory", hint="run it on a machine with more memory"))
    return 0  # any other exception ends the process with its traceback, which the parent shows


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
