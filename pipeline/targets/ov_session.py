"""OpenVINO models, opened: from the compiled blob where it fits this machine, else from the portable IR."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipeline import hardware
from pipeline.engine import Array
from pipeline.errors import RecipeError, StageError, UnavailableError
from pipeline.stages.openvino.compile import import_blob, import_properties
from pipeline.stages.openvino.settings import Settings, properties

R = TypeVar("R")
LOG = logging.getLogger("enginewright")
_DTYPE = {"i64": np.int64, "i32": np.int32, "f32": np.float32, "f16": np.float16, "u8": np.uint8, "boolean": np.bool_}


class Graph:
    """A compiled model. Arrays go in as the caller has them and come out in float32 where they are floats."""

    def __init__(self, compiled: Any, source: str, mapped: Any = None) -> None:
        self.compiled = compiled
        self._mapped = mapped  # a blob's memory
        self.source = source
        """`blob` or `ir`: where it came from."""
        self.inputs: dict[str, Any] = {port.get_any_name(): port for port in compiled.inputs}
        self.outputs: dict[str, Any] = {port.get_any_name(): port for port in compiled.outputs}

    def cast(self, name: str, value: Any) -> Array:
        """A contiguous array in the type that the input needs. Raises RecipeError where that would lose meaning."""
        array, dtype = np.asarray(value), np.dtype(_DTYPE[self.inputs[name].get_element_type().get_type_name()])
        if not np.can_cast(array.dtype, dtype, "same_kind"):
            raise RecipeError(f"input '{name}' is {array.dtype}, and the model takes {dtype}", hint="convert it first")
        return np.ascontiguousarray(array, dtype)

    def request(self) -> Any:
        """A new infer request, with state of its own."""
        return guarded(self.compiled.create_infer_request)

    def infer(self, request: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One forward pass. What it returns is valid until the request's next."""
        given = {name: self.cast(name, value) for name, value in feeds.items()}
        guarded(lambda: request.infer(given, share_inputs=True, share_outputs=True))
        found = {name: request.get_tensor(port).data for name, port in self.outputs.items()}
        return {name: v.astype(np.float32, copy=False) if v.dtype.kind == "f" else v for name, v in found.items()}


def open_graph(
    folder: Path,
    engine: Mapping[str, Any],
    settings: Settings,
    *,
    change: Callable[[Any], bool] | None = None,
    answers: str = "all",
) -> Graph:
    """The model of an engine's folder. `answers` is what is wanted of a decoder's logits, `all` or `last`.

    A blob that does not fit (another OpenVINO, CPU, or settings) is passed over with one line that says why; `change`
    is then applied to the model of the IR before it is compiled.
    """
    ov = runtime()
    asked = properties(settings, decoder=engine["kind"] == "decoder")
    compiled = engine.get("compiled")
    if compiled and compiled.get("answers", answers) == answers:
        try:
            why = unfit(compiled, settings.device, asked, ov.__version__)
            if not why:
                weights = (folder / engine["components"]["model"]).with_suffix(".bin")
                told = import_properties(asked, compiled["weights"], weights)
                found, mapped = import_blob(ov.Core(), folder / compiled["file"], settings.device, told)
                return Graph(found, "blob", mapped)
        except (RuntimeError, OSError, ValueError) as error:
            why = f"OpenVINO does not load it: {_first_line(error)}"
        except KeyError as error:
            why = f"engine.json does not say its {error}"
        LOG.warning("%s is not used: %s; %s is compiled instead", compiled["file"], why, engine["components"]["model"])
    return Graph(_compile(ov, folder / engine["components"]["model"], settings.device, asked, change), "ir")


def unfit(compiled: Mapping[str, Any], device: str, asked: Mapping[str, str], version: str) -> str:
    """Why a blob cannot be used here; empty where it can. A blob is machine code: nothing near enough is enough."""
    host = hardware.probe()
    if compiled["openvino"] != version:
        return f"it was compiled by OpenVINO {compiled['openvino']}, this is {version}"
    if compiled["device"] != device:
        return f"it was compiled for {compiled['device']}, and {device} is asked for"
    if (compiled["os"], compiled["arch"]) != (host.os, host.arch):
        return f"it was compiled for {compiled['os']} on {compiled['arch']}, this is {host.os} on {host.arch}"
    if tuple(compiled["isa"]) != host.isa:
        other = sorted(set(compiled["isa"]) ^ set(host.isa))
        return f"it was compiled for another CPU (they differ in {', '.join(other)})"
    if compiled["properties"] != asked:
        differ = sorted(
            name for name in {*asked, *compiled["properties"]} if asked.get(name) != compiled["properties"].get(name)
        )
        return f"other settings are asked for ({', '.join(differ)})"
    return ""


def _compile(ov: Any, file: Path, device: str, asked: Mapping[str, str], change: Callable[[Any], bool] | None) -> Any:
    for each in (file, file.with_suffix(".bin")):
        if not each.is_file():
            raise StageError(f"{each} is missing", hint="the artifact is incomplete: run `enginewright verify` on it")
    core = ov.Core()
    if device not in {name.partition(".")[0] for name in core.available_devices}:
        raise UnavailableError(
            f"OpenVINO sees no {device} here: {', '.join(core.available_devices)}",
            hint="install the device's driver, or open the engine with the setting device: CPU",
        )
    try:
        model = core.read_model(file)
        if change:
            change(model)
        return core.compile_model(model, device, dict(asked))
    except RuntimeError as error:
        raise StageError(
            f"{file}: OpenVINO {ov.__version__} cannot load it: {_first_line(error)}",
            hint="run `enginewright verify` on the artifact; if it is whole, this OpenVINO may be too old for it",
        ) from error


def runtime() -> Any:
    """The openvino module. Raises UnavailableError where it is not installed."""
    try:
        import openvino
    except ImportError as error:
        raise UnavailableError(
            "openvino is not installed", hint="install the extra: pip install 'enginewright[openvino]'"
        ) from error
    return openvino


def guarded(call: Callable[[], R]) -> R:
    """Run it, with OpenVINO's failures as StageError."""
    try:
        return call()
    except RuntimeError as error:
        raise StageError(f"OpenVINO failed: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """OpenVINO says where in its sources it failed first, and why last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
