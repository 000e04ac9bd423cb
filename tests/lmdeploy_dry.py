"""Walk LMDeploy 0.18's TurboMind loader over checkpoints without CUDA: run by the Python of the toolchain lmdeploy.

    python lmdeploy_dry.py FOLDER@TP ...

Prints one JSON line a folder: {"format", "dtype", "keys", "left", "bytes"} or {"error"}. Everything but device memory
and kernels is LMDeploy's own: configuration, reading, resolving, fusing, sharding, packing. `left` are tensors that
nobody read.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import json
import sys
import types
from collections.abc import Iterator
from typing import Any

BITS = {"TYPE_UINT4": 4, "TYPE_UINT8": 8, "TYPE_FP8_E4M3": 8, "TYPE_FP4_E2M1": 4, "TYPE_FP16": 16, "TYPE_BF16": 16}
BITS |= {"TYPE_FP32": 32, "TYPE_INT32": 32}


class DataType(enum.IntEnum):
    """The values of the compiled module."""

    TYPE_INVALID = 0
    TYPE_BOOL = 1
    TYPE_UINT4 = 4
    TYPE_UINT8 = 8
    TYPE_UINT16 = 16
    TYPE_UINT32 = 32
    TYPE_UINT64 = 64
    TYPE_INT8 = 65544
    TYPE_INT16 = 65552
    TYPE_INT32 = 65568
    TYPE_INT64 = 65600
    TYPE_FP16 = 66826
    TYPE_BF16 = 67591
    TYPE_FP32 = 67607
    TYPE_FP64 = 68404
    TYPE_FP4_E2M1 = 66049
    TYPE_FP8_E4M3 = 66563
    TYPE_GENERIC_FLOAT = -1


class Anything:
    """A configuration object of C++: takes every attribute."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def clone(self) -> Any:
        return copy.deepcopy(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = Anything()
        object.__setattr__(self, name, value)
        return value


class Fake(types.ModuleType):
    """lmdeploy.turbomind._turbomind without its libraries."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (Anything,), {})
        setattr(self, name, value)
        return value


class Target:
    """Memory of a device that was allocated."""

    def __init__(self, shape: Any, kind: Any) -> None:
        size = 1
        for dim in shape:
            size *= int(dim)
        self.shape, self.type = shape, kind
        self.byte_size = size * BITS[DataType(int(kind)).name] // 8

    def copy_from(self, tensor: Any) -> None:
        self.data = tensor.clone()


class Module:
    """A node of the module tree that TurboMind builds."""

    def __init__(self, config: Any) -> None:
        self.cfg = config
        self.params: dict[str, Target] = {}
        self.children: dict[str, Module] = {}

    def set_plan(self, plan: Any) -> None:
        pass

    def param(self, name: str) -> Any:
        def alloc(shape: Any, kind: Any) -> Target:
            self.params[name] = Target(shape, kind)
            return self.params[name]

        return types.SimpleNamespace(alloc=alloc)

    def add_child_raw(self, name: str, child: Module) -> None:
        self.children[name] = child

    def walk(self) -> Iterator[Target]:
        yield from self.params.values()
        for child in self.children.values():
            yield from child.walk()


def install() -> Any:
    """Put the fake where LMDeploy imports the compiled module; returns it."""
    fake = Fake("lmdeploy.turbomind._turbomind")
    fake.DataType = DataType
    fake.ActivationType = enum.Enum("ActivationType", {"kSilu": 0, "kSiluGptOss": 1})
    sys.modules["lmdeploy.turbomind._turbomind"] = fake
    import torch
    from lmdeploy.turbomind import converter

    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    converter._get_executable_dtypes = lambda formats, device: {"float16", "bfloat16"}
    fake.create_module = Module
    return fake


def dry(folder: str, tp: int, fake: Any) -> dict[str, Any]:
    """Load one folder as `tp` GPUs would."""
    from lmdeploy import TurbomindEngineConfig
    from lmdeploy.turbomind import converter
    from lmdeploy.turbomind.builders._base import Context, ParallelGroup
    from lmdeploy.turbomind.checkpoint import Prefix, create_checkpoint

    config = TurbomindEngineConfig(devices=list(range(tp)), tp=tp, attn_tp_size=tp, mlp_tp_size=tp)
    model, _, dtype = converter.get_tm_config(folder, config)
    none = DataType.TYPE_INVALID
    plan = types.SimpleNamespace(
        family="dry", shape_constraints=((1, 1), (1, 1)), bridge=(1, 1, none, none), gate_up=lambda act, n: 0
    )
    gemm = types.SimpleNamespace(get_weight_plan=lambda query: plan)
    roots = [Module(None) for _ in range(tp)]
    context = Context([contextlib.nullcontext() for _ in range(tp)], gemm, dtype, none)
    group, one = ParallelGroup(tp, list(range(tp))), ParallelGroup(1, [0] * tp)
    groups = {"attn_tp": group, "mlp_tp": group, "ep": one, "model_tp": group, "dense_tp": group}
    model.bind_runtime(ctx=context, root_handles=roots, **groups)
    checkpoint = create_checkpoint(folder, mappings=getattr(model, "_loader_mappings", []))
    keys = set(checkpoint.keys())
    model.model(Prefix(checkpoint))
    held = sum(target.byte_size for target in roots[0].walk())
    left = sorted(checkpoint.keys())
    return {"format": config.model_format, "dtype": config.dtype, "keys": len(keys), "left": left, "bytes": held}


def main(argv: list[str]) -> int:
    fake = install()
    for word in argv:
        folder, _, tp = word.partition("@")
        try:
            found = dry(folder, int(tp or 1), fake)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
