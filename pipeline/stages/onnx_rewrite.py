"""Read an exported graph without its weights, find each weight's bytes, and edit nodes by name."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import StageError
from pipeline.stages.checkpoint import Tensor

_TYPES = {1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 16: "BF16"}
"""TensorProto data type -> safetensors type."""
FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16


@dataclass(frozen=True)
class Linear:
    """A matrix product with a constant weight: `node` computes activations [.., K] times the weight."""

    node: Any
    weight: str
    """The initializer."""
    transposed: bool
    """Stored [N, K], as Hugging Face does; else [K, N]."""
    n: int
    k: int
    bias: str = ""
    """An initializer [N] that Gemm adds."""


class ExportedGraph:
    """The graph of one component of an export. Weights are looked for beside it, then in the model folder."""

    def __init__(self, path: Path, model: Path | None) -> None:
        import onnx

        self.path = path
        self.folders = [path.parent, *([model] if model else [])]
        self.proto = onnx.load_model(path, load_external_data=False)
        self.initializers = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        self._index()

    def _index(self) -> None:
        self.producers = {name: node for node in self.proto.graph.node for name in node.output if name}
        self.consumers: dict[str, list[Any]] = defaultdict(list)
        for node in self.proto.graph.node:
            for name in node.input:
                if name:
                    self.consumers[name].append(node)

    @property
    def outputs(self) -> set[str]:
        return {value.name for value in self.proto.graph.output}

    def source(self, name: str) -> Tensor:
        """Where an initializer's bytes are. Only for initializers with external data."""
        tensor = self.initializers[name]
        info = {entry.key: entry.value for entry in tensor.external_data}
        location = info["location"]
        if Path(location).name != location:
            raise StageError(f"{self.path.name}: initializer '{name}' lies in '{location}', outside of the export")
        for folder in self.folders:
            path = folder / location
            if path.exists():
                break
        else:
            raise StageError(
                f"{self.path.name}: initializer '{name}' lies in {location}, which is not there",
                hint="the model folder changed since the export: build again",
            )
        kind = _TYPES.get(tensor.data_type)
        if kind is None:
            raise StageError(f"{self.path.name}: initializer '{name}' has the unknown data type {tensor.data_type}")
        offset = int(info.get("offset", 0))
        length = int(info.get("length", path.stat().st_size - offset))
        if offset + length > path.stat().st_size:
            raise StageError(
                f"{location} ends before initializer '{name}' does", hint="the model folder changed: build again"
            )
        return Tensor(name, kind, tuple(tensor.dims), path, offset, length)

    def is_external(self, name: str) -> bool:
        tensor = self.initializers[name]
        return bool(tensor.data_location == tensor.EXTERNAL)

    def drop_casts(self) -> None:
        """Let the users of `Cast(initializer) to float` use the initializer itself: it is written as fp32 later."""
        for node in list(self.proto.graph.node):
            if node.op_type != "Cast" or node.input[0] not in self.initializers or node.attribute[0].i != FLOAT:
                continue
            if self.initializers[node.input[0]].data_type in (FLOAT16, BFLOAT16) and node.output[0] not in self.outputs:
                self.replace(node.output[0], node.input[0])
                self.proto.graph.node.remove(node)
        self._index()

    def replace(self, old: str, new: str) -> None:
        """Let every node that reads `old` read `new`."""
        for node in self.consumers.pop(old, []):
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new
            self.consumers[new].append(node)

    def linears(self) -> list[Linear]:
        """Every product of activations with a two-dimensional constant, in graph order."""
        found = (self._linear(node) for node in self.proto.graph.node)
        return [linear for linear in found if linear is not None]

    def _linear(self, node: Any) -> Linear | None:
        if node.op_type not in ("MatMul", "FusedMatMul", "Gemm"):
            return None
        attributes = {attribute.name: attribute for attribute in node.attribute}

        def integer(name: str) -> int:
            return int(attributes[name].i) if name in attributes else 0

        scales = [attributes[name].f for name in ("alpha", "beta") if name in attributes]
        if any(scale != 1 for scale in scales) or integer("transA") or integer("transBatchA") or integer("transBatchB"):
            return None
        transposed, weight = bool(integer("transB")), node.input[1]
        before = self.producers.get(weight)
        if before is not None and before.op_type == "Transpose" and before.input[0] in self.initializers:
            permutation = next((list(item.ints) for item in before.attribute if item.name == "perm"), [1, 0])
            if permutation != [1, 0]:
                return None
            weight, transposed = before.input[0], not transposed
        tensor = self.initializers.get(weight)
        if tensor is None or len(tensor.dims) != 2 or tensor.data_type not in (FLOAT, FLOAT16, BFLOAT16):
            return None
        rows, columns = tensor.dims
        n, k = (rows, columns) if transposed else (columns, rows)
        bias = node.input[2] if len(node.input) > 2 else ""
        if bias and (bias not in self.initializers or list(self.initializers[bias].dims) != [n]):
            return None
        return Linear(node, weight, transposed, n, k, bias)

    def head(self) -> str:
        """Name of the node that makes the logits; "" when there is none."""
        name = "logits"
        while name in self.producers:
            node = self.producers[name]
            if node.op_type in ("MatMul", "FusedMatMul", "Gemm"):
                return str(node.name)
            name = node.input[0]
        return ""

    def prune(self) -> None:
        """Remove Transposes and other nodes whose outputs nobody reads any more."""
        while True:
            self._index()
            dead = [
                node
                for node in self.proto.graph.node
                if not any(name in self.consumers or name in self.outputs for name in node.output)
            ]
            if not dead:
                return
            for node in dead:
                self.proto.graph.node.remove(node)

    def inline_values(self, name: str) -> Any:
        """The array of an initializer that is inside the file."""
        import onnx

        return np.asarray(onnx.numpy_helper.to_array(self.initializers[name]))
