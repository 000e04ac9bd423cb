"""TensorRT's Python API, whichever of its two flavours: how it is imported, its one logger, its errors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from pipeline.errors import UnavailableError
from pipeline.stages.tensorrt.flavours import Flavour, flavour

_QUIET = ("Make sure input", "Local timing cache")
"""Warnings of every build that ask for nothing."""
_loggers: dict[str, Any] = {}


def load(name: str) -> Any:
    """The module of a flavour: `tensorrt`, `tensorrt_rtx`, or the latter's bindings as the package index has them.

    Raises UnavailableError with the command that installs it, or that says which library is missing.
    """
    asked = flavour(name)
    problems = []
    for module in asked.modules:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                problems.append(f"{module}: {error}")
        except (ImportError, OSError) as error:  # the bindings are here, the library that they load is not
            problems.append(f"{module}: {error}")
        else:
            if hasattr(found, "Builder"):
                return found
            problems.append(f"{module} is a shell without Builder: its libraries are not installed")
    why = f" ({'; '.join(problems)})" if problems else ""
    raise UnavailableError(f"{asked.title} is not installed here{why}", hint=f"pip install 'enginewright[{name}]'")


def logger(trt: Any) -> Any:
    """The process' logger: the library ignores every one after the first. `said` of it are its last complaints."""
    if trt.__name__ not in _loggers:

        class Logger(trt.ILogger):  # type: ignore[misc]  # the class comes from the loaded library
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.said: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if int(severity) <= int(trt.ILogger.WARNING) and not any(word in message for word in _QUIET):
                    print(message, flush=True)  # noqa: T201  into the step's log
                    if int(severity) <= int(trt.ILogger.ERROR):
                        self.said.append(message)

        _loggers[trt.__name__] = Logger()
    return _loggers[trt.__name__]


def complaints(trt: Any, clear: bool = True) -> str:
    """What the library called an error since the last time, in one line; empty when nothing."""
    said: list[str] = logger(trt).said
    text = "; ".join(dict.fromkeys(line.strip().splitlines()[0] for line in said if line.strip()))
    if clear:
        said.clear()
    return text


def version(trt: Any) -> str:
    """`1.7.1.116`."""
    return str(trt.__version__)


def is_rtx(asked: Flavour) -> bool:
    """Whether it compiles ahead of time on a CPU, for a list of compute capabilities."""
    return asked.builds_on_cpu


def monitor(trt: Any, progress: Callable[[float, float, str], None]) -> Any:
    """A progress monitor that passes the outermost phases on. Its `cancelled` is the exception that ended the build.

    A KeyboardInterrupt raised while `progress` runs cancels the build at its next step and is kept for the caller.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled: BaseException | None = None
            self.phases: dict[str, tuple[int, int]] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            depth = self.phases[parent][1] + 1 if parent in self.phases else 0
            self.phases[name] = (steps, depth)

        def step_complete(self, name: str, step: int) -> bool:
            steps, depth = self.phases.get(name, (0, 0))
            try:
                if depth == 0:
                    progress(step + 1, steps, name)
            except BaseException as error:
                self.cancelled = error
            return self.cancelled is None

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)

    return Monitor()
