"""A stand-in for TensorRT 10.16 or 11.1 whose every class has the members and signatures of the real bindings.

The signatures are recorded (see trt_signatures.py): an attribute that the real class lacks raises AttributeError, a
call that the real signature does not take raises TypeError. What a method does is small and written here; what it was
told is kept in `calls`. The plan that its builder gives is JSON of what the builder was told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import onnx

from tests.conftest import ROOT

VERSIONS = ("10.16.1.11", "11.1.0.106")
_KINDS = {1: "FLOAT", 10: "HALF", 16: "BF16", 7: "INT64", 6: "INT32", 9: "BOOL", 3: "INT8"}


def recorded(version: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "tests" / "golden" / "tensorrt" / f"{version}.json").read_text("utf-8"))
    return found


def check_call(signature: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise TypeError when a signature, as pybind writes it, does not take these arguments (self left out)."""
    text = re.sub(r"^\d+\. ", "", signature)
    inside = text[text.index("(") + 1 : text.rindex(") ->")]
    parameters = [part.strip() for part in _split(inside)][1:]
    names = [part.partition(":")[0].strip() for part in parameters]
    needed = [name for name, part in zip(names, parameters, strict=True) if "=" not in part]
    given = [*names[: len(args)], *kwargs]
    if len(args) > len(names) or set(kwargs) - set(names) or set(needed) - set(given) or len(set(given)) != len(given):
        raise TypeError(f"incompatible arguments {args} {kwargs} for {signature}")


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for place, char in enumerate(text):
        depth += (char in "[(") - (char in "])")
        if char == "," and not depth:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]] if text.strip() else []


class Member:
    """Base of every stand-in class: `_members` are the recorded ones, `_does` what they do here."""

    _members: ClassVar[dict[str, str]] = {}
    _name = ""

    def __init__(self, **does: Any) -> None:
        object.__setattr__(self, "calls", [])
        object.__setattr__(self, "values", {})
        object.__setattr__(self, "_does", does)

    def __getattr__(self, name: str) -> Any:
        if name not in self._members:
            raise AttributeError(f"{self._name} of this version has no {name}")
        signature, does = self._members[name], self._does.get(name)
        if not signature:
            return self.values.get(name, does)

        def call(*args: Any, **kwargs: Any) -> Any:
            check_call(signature, args, kwargs)
            self.calls.append((name, args, kwargs))
            return does(*args, **kwargs) if isinstance(does, Callable) else does  # type: ignore[arg-type]

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            return
        if name not in self._members:
            raise AttributeError(f"{self._name} of this version has no {name}")
        self.values[name] = value


def stand_in(version: str, *, gpu: bool = True, context: Callable[[Any], Any] | None = None) -> Any:
    """The module. `gpu` False: no driver, so the factory of builders gives nothing. `context` makes execution contexts
    of the engine that its runtime loads."""
    known = recorded(version)
    trt = SimpleNamespace(__name__=f"tensorrt_{version.replace('.', '_')}", __version__=version, told={})
    for name, members in known["enums"].items():
        setattr(trt, name, IntEnum(name, {each: index for index, each in enumerate(members)}))
    classes = {
        name: type(name, (Member,), {"_members": members, "_name": name}) for name, members in known["classes"].items()
    }

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        def __init__(self) -> None:
            pass

    class IProgressMonitor:
        def __init__(self) -> None:
            pass

    def new_builder(logger: Any) -> Any:
        check_call(known["classes"]["Builder"]["__init__"], (logger,), {})
        if not gpu:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        config = classes["IBuilderConfig"](
            add_optimization_profile=lambda profile: (
                len([c for c in config.calls if c[0] == "add_optimization_profile"]) - 1
            ),
            create_timing_cache=lambda data: classes["ITimingCache"](serialize=lambda: data + b"learned"),
            set_timing_cache=True,
            get_timing_cache=lambda: next(c[1][0] for c in config.calls if c[0] == "set_timing_cache"),
            set_flag=None,
        )
        trt.told["config"] = config

        def make(network: Any, config: Any) -> bytes:
            monitor = config.values["progress_monitor"]
            monitor.phase_start("build", None, 2)
            for step in range(2):
                if not monitor.step_complete("build", step):
                    return None  # type: ignore[return-value]
            monitor.phase_finish("build")
            flags = [c[1][0].name for c in config.calls if c[0] == "set_flag"]
            profiles = [c[1][0].calls for c in config.calls if c[0] == "add_optimization_profile"]
            return json.dumps({"version": version, "flags": flags, "profiles": str(profiles)}).encode()

        return classes["Builder"](
            create_network=lambda flags=0: trt.told.setdefault("networks", []).append(flags) or new_network(),
            create_builder_config=lambda: config,
            create_optimization_profile=lambda: classes["IOptimizationProfile"](),
            build_serialized_network=make,
        )

    def new_network() -> Any:
        trt.told["network"] = classes["INetworkDefinition"](num_layers=0, num_inputs=0, num_outputs=0)
        return trt.told["network"]

    def new_parser(network: Any, logger: Any) -> Any:
        check_call(known["classes"]["OnnxParser"]["__init__"], (network, logger), {})

        def parse(path: str) -> bool:
            graph = onnx.load_model(path, load_external_data=False).graph
            for kind in ("input", "output"):
                values = [tensor(value) for value in getattr(graph, kind)]
                network._does[f"num_{kind}s"] = len(values)
                network._does[f"get_{kind}"] = lambda index, values=values: values[index]
            return True

        return classes["OnnxParser"](parse_from_file=parse, supports_model_v2=True, num_errors=0, num_subgraphs=0)

    def tensor(value: Any) -> Any:
        shape = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim]
        kind = trt.DataType[_KINDS[value.type.tensor_type.elem_type]]
        return classes["ITensor"](name=value.name, dtype=kind, shape=tuple(shape))

    def new_runtime(logger: Any) -> Any:
        runtime = classes["Runtime"](
            deserialize_cuda_engine=lambda plan: new_engine(plan) if context else None,
        )
        trt.told["runtime"] = runtime
        return runtime

    def new_engine(plan: bytes) -> Any:
        made = context(trt) if context else {}
        return classes["ICudaEngine"](
            create_engine_inspector=lambda: classes["EngineInspector"](
                get_engine_information=lambda form: json.dumps({"Layers": [], "plan": len(plan)})
            ),
            **made,
        )

    trt.ILogger, trt.IProgressMonitor = ILogger, IProgressMonitor
    trt.Builder, trt.OnnxParser, trt.Runtime = new_builder, new_parser, new_runtime
    trt.IAttentionInputLayer = classes.get("IAttentionInputLayer")
    trt.classes = classes
    return trt


def called(member: Any, name: str) -> list[tuple[Any, ...]]:
    """Positional arguments of every call of a method."""
    return [args for each, args, _ in member.calls if each == name]


def write_plan(folder: Path, about: dict[str, Any]) -> None:
    """engine.json as the engine step writes it."""
    (folder / "engine.json").write_text(json.dumps(about), "utf-8")
