"""ONNX Runtime sessions: how one is opened, and the graph behind it with its names and types."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipeline import hardware
from pipeline.engine import Array
from pipeline.errors import RecipeError, StageError, UnavailableError
from pipeline.targets.ort_settings import CPU as CPU
from pipeline.targets.ort_settings import CUDA as CUDA
from pipeline.targets.ort_settings import DEVICE, Settings

R = TypeVar("R")

_DTYPE = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
_QUIET = 4  # only what is fatal: every error comes as an exception, with the same text


class Graph:
    """An open session. Arrays go in as the caller has them and come out in float32 where they are floats."""

    def __init__(self, file: Path, settings: Settings) -> None:
        self.file = file
        self.session = _open(file, settings)
        self.inputs: dict[str, Any] = {arg.name: arg for arg in self.session.get_inputs()}
        self.outputs: dict[str, Any] = {arg.name: arg for arg in self.session.get_outputs()}
        self.device = DEVICE[settings.provider]
        self.device_id = settings.device_id if self.device != "cpu" else 0

    def dtype(self, name: str) -> np.dtype[Any]:
        """numpy's type of an input or output. Raises UnavailableError for one that numpy does not have (bfloat16)."""
        declared = (self.inputs.get(name) or self.outputs[name]).type
        if declared not in _DTYPE:
            raise UnavailableError(
                f"{self.file.name}: '{name}' is {declared}, which this engine cannot feed",
                hint="build with precision fp16 or fp32",
            )
        return np.dtype(_DTYPE[declared])

    def cast(self, name: str, value: Any) -> Array:
        """A contiguous array in the type that the input needs. Raises RecipeError where that would lose meaning."""
        array, dtype = np.asarray(value), self.dtype(name)
        if not np.can_cast(array.dtype, dtype, "same_kind"):
            raise RecipeError(f"input '{name}' is {array.dtype}, and the graph takes {dtype}", hint="convert it first")
        return np.ascontiguousarray(array, dtype)

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One forward pass through host memory."""
        feeds = {name: self.cast(name, value) for name, value in inputs.items()}
        values = self.call(lambda: self.session.run(list(outputs), feeds))
        return {name: as_float32(value) for name, value in zip(outputs, values, strict=True)}

    def call(self, run: Callable[[], R]) -> R:
        """Run the session, with its failures as StageError."""
        try:
            return run()
        except MemoryError:
            raise
        except Exception as error:  # onnxruntime's errors share no base class but Exception
            raise StageError(f"{self.file.name}: ONNX Runtime failed: {_first_line(error)}") from error

    def value(self, array: Array) -> Any:
        """An OrtValue on the session's device. On the CPU it shares the array's memory."""
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self.device, self.device_id)


def as_float32(array: Array) -> Array:
    """Floats as float32, the rest as it is."""
    return array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array


def _open(file: Path, settings: Settings) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UnavailableError(
            "onnxruntime is not installed", hint="install the extra: pip install 'enginewright[onnxruntime]'"
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):  # two distributions that overwrote each other leave a shell behind
        raise UnavailableError(
            "the installed onnxruntime is broken: it has no InferenceSession",
            hint="uninstall onnxruntime and onnxruntime-gpu, then install exactly one of them",
        )
    onnxruntime.disable_telemetry_events()
    if settings.provider not in onnxruntime.get_available_providers():
        raise UnavailableError(
            f"the installed onnxruntime {onnxruntime.__version__} has no {settings.provider}",
            hint="uninstall onnxruntime and install the extra: pip install 'enginewright[onnxruntime-gpu]'",
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads or _threads()
    options.enable_cpu_mem_arena = settings.arena
    options.log_severity_level = _QUIET
    # Only a device has a number to choose.
    provider = (settings.provider, {"device_id": str(settings.device_id)} if settings.provider != CPU else {})
    if not file.is_file():
        raise StageError(f"{file} is missing", hint="the artifact is incomplete: run `enginewright verify` on it")
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=[provider])
    except MemoryError:
        raise
    except Exception as error:  # onnxruntime's errors share no base class but Exception
        raise StageError(
            f"{file}: ONNX Runtime {onnxruntime.__version__} cannot load it: {_first_line(error)}",
            hint="run `enginewright verify` on the artifact; if it is whole, this onnxruntime may be too old for it",
        ) from error
    # Where the provider's libraries do not load, onnxruntime warns and goes on with the CPU.
    if session.get_providers()[0] != settings.provider:
        raise UnavailableError(
            f"{settings.provider} did not start: onnxruntime would have used {session.get_providers()[0]}",
            hint="check the driver and that the CUDA and cuDNN libraries of this onnxruntime are installed",
        )
    session.disable_fallback()
    return session


def _threads() -> int:
    """0, ONNX Runtime's own count of physical cores, unless a quota or an affinity mask allows fewer."""
    allowed = hardware.probe().cores
    return allowed if allowed < (os.cpu_count() or 1) else 0


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
