"""Read an exported graph without its weights, find each weight's bytes, and edit nodes by name."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.errors import StageError
from pipeline.stages.checkpoint import Tensor

_TYPES = {
    1: "F32",
    2: "U8",
    3: "I8",
    4: "U16",
    5: "I16",
    6: "I32",
    7: "I64",
    9: "BOOL",
    10: "F16",
    11: "F64",
    16: "BF16",
}
"""TensorProto data type -> safetensors type."""
FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16
MICROSOFT = "com.microsoft"
_TABLE = 1 << 16


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


@dataclass(frozen=True)
class Held(Tensor):
    """A tensor whose values are in memory, inside the graph's file."""

    array: Any = None

    def _read(self, start: int, stop: int) -> Any:
        return self.array.reshape(self.shape or (1,))[start:stop]


@dataclass(frozen=True)
class Stacked(Tensor):
    """Tensors of one type one above the other, along the first axis."""

    parts: tuple[Tensor, ...] = ()

    def rows(self, start: int, stop: int, dtype: Literal["float32", "native"] = "float32") -> Any:
        found, above = [], 0
        for part in self.parts:
            first, last = max(start - above, 0), min(stop - above, part.shape[0])
            if first < last:
                found.append(part.rows(first, last, dtype))
            above += part.shape[0]
        return found[0] if len(found) == 1 else np.concatenate(found)


class ExportedGraph:
    """The graph of one component of an export. Weights are looked for beside it, then in the model folder."""

    def __init__(self, path: Path, model: Path | None) -> None:
        import onnx

        self.path = path
        self.folders = [path.parent, *([model] if model else [])]
        self.proto = onnx.load_model(path, load_external_data=False)
        self.initializers = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        self._stacks: dict[str, tuple[str, ...]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look at the graph's nodes anew, after they were edited from outside."""
        self.producers = {name: node for node in self.proto.graph.node for name in node.output if name}
        self.consumers: dict[str, list[Any]] = defaultdict(list)
        self.captured: set[str] = set()
        for node in self.proto.graph.node:
            for name in node.input:
                if name:
                    self.consumers[name].append(node)
            for name in _captured(node):
                self.captured.add(name)
                self.consumers[name].append(node)

    @property
    def outputs(self) -> set[str]:
        return {value.name for value in self.proto.graph.output}

    def source(self, name: str) -> Tensor:
        """Where an initializer's bytes are: in a file beside the graph or in the model folder, or in the graph."""
        tensor = self.initializers[name]
        if name in self._stacks:
            parts = tuple(self.source(part) for part in self._stacks[name])
            length = sum(part.length for part in parts)
            return Stacked(name, parts[0].dtype, tuple(tensor.dims), parts[0].path, 0, length, parts)
        if tensor.data_location != tensor.EXTERNAL:
            return self._held(name)
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

    def _held(self, name: str) -> Tensor:
        import onnx

        tensor = self.initializers[name]
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.data_type == BFLOAT16:
            array = array.view(np.uint16)
        kind = _TYPES.get(tensor.data_type)
        if kind is None:
            raise StageError(f"{self.path.name}: initializer '{name}' has the unknown data type {tensor.data_type}")
        return Held(name, kind, tuple(tensor.dims), self.path, 0, array.nbytes, array)

    def drop_casts(self) -> set[str]:
        """Let the users of `Cast(initializer) to float` read the initializer itself. Returns the initializers of 16
        bits for which that was done: they are to be written as fp32."""
        widened = set()
        for name, tensor in self.initializers.items():
            readers = self.consumers.get(name, [])
            if tensor.data_type not in (FLOAT16, BFLOAT16) or not readers or name in self.outputs:
                continue
            if all(node.op_type == "Cast" and node.attribute[0].i == FLOAT for node in readers):
                if any(node.output[0] in self.outputs or node.output[0] in self.captured for node in readers):
                    continue
                for node in readers:
                    self.rename(node.output[0], name)
                    self.proto.graph.node.remove(node)
                widened.add(name)
        self.refresh()
        return widened

    def rename(self, old: str, new: str) -> None:
        """Let every node that reads `old` read `new`; subgraphs excepted. `refresh` when done."""
        for node in self.consumers[old]:
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new

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
        """Output of the product that makes the logits; "" when there is none."""
        name = "logits"
        while name in self.producers:
            node = self.producers[name]
            if node.op_type in ("MatMul", "FusedMatMul", "Gemm"):
                return name
            name = node.input[0]
        return ""

    def stack(self, name: str, parts: tuple[str, ...]) -> str:
        """A new initializer: the given ones above each other. They must have one type and one width."""
        import onnx

        first = self.initializers[parts[0]]
        rows = sum(self.initializers[part].dims[0] for part in parts)
        self.initializers[name] = onnx.TensorProto(name=name, dims=[rows, *first.dims[1:]], data_type=first.data_type)
        self._stacks[name] = parts
        return name

    def attentions(self, linears: list[Linear]) -> list[tuple[Any, tuple[Linear, ...], tuple[str, ...]]]:
        """The GroupQueryAttention nodes whose query, key and value are three products of the same activations with
        [N, K] weights of one type: (node, the three products, their three biases or none)."""
        by_output = {linear.node.output[0]: linear for linear in linears}
        found = []
        for node in self.proto.graph.node:
            if node.op_type != "GroupQueryAttention" or not node.input[1]:
                continue
            three, biases = [], []
            for name in node.input[:3]:
                before = self.producers.get(name)
                if before is not None and before.op_type == "Add":
                    biases.append(next((item for item in before.input if item in self.initializers), ""))
                    name = next((item for item in before.input if item in by_output), "")
                if name in by_output:
                    three.append(by_output[name])
            kinds = {self.initializers[linear.weight].data_type for linear in three}
            bias_kinds = {self.initializers[name].data_type if name else 0 for name in biases}
            if len(three) != 3 or not all(linear.transposed and not linear.bias for linear in three):
                continue
            if len({linear.node.input[0] for linear in three}) != 1 or len(kinds) != 1 or len(biases) not in (0, 3):
                continue
            if any(len(self.consumers[linear.node.output[0]]) != 1 for linear in three) or len(bias_kinds) > 1:
                continue
            if any(linear.node.op_type != "FusedMatMul" for linear in three) or 0 in bias_kinds:
                continue
            found.append((node, tuple(three), tuple(biases)))
        return found

    def pack(self, attention: Any, three: tuple[Linear, ...], biases: tuple[str, ...]) -> Linear:
        """Let one product make query, key and value, which GroupQueryAttention takes side by side."""
        node = three[0].node
        base = f"{attention.name}.qkv_proj"
        weight = self.stack(f"{base}.weight", tuple(linear.weight for linear in three))
        node.name, node.input[1] = base, weight
        if biases:
            add = self.producers[attention.input[0]]
            bias = self.stack(f"{base}.bias", biases)
            add.input[list(add.input).index(biases[0])] = bias
        attention.input[1] = attention.input[2] = ""
        self.refresh()
        n, k = self.initializers[weight].dims
        return Linear(node, weight, True, n, k)

    def tables(self) -> list[Any]:
        """The Gather nodes that look rows up in a two-dimensional float table of at least `_TABLE` values."""
        found = []
        for node in self.proto.graph.node:
            table = self.initializers.get(node.input[0]) if node.op_type == "Gather" else None
            axis = next((item.i for item in node.attribute if item.name == "axis"), 0)
            if (
                table is not None
                and axis == 0
                and len(table.dims) == 2
                and table.data_type in (FLOAT, FLOAT16, BFLOAT16)
            ):
                if table.dims[0] * table.dims[1] >= _TABLE:
                    found.append(node)
        return found

    def become(self, node: Any, op: str, inputs: list[str], **attributes: Any) -> None:
        """Turn a node into a com.microsoft one; its name and outputs stay."""
        import onnx

        node.op_type, node.domain = op, MICROSOFT
        del node.input[:], node.attribute[:]
        node.input.extend(inputs)
        for key, value in sorted(attributes.items()):
            node.attribute.append(onnx.helper.make_attribute(key, value))
        if not any(opset.domain == MICROSOFT for opset in self.proto.opset_import):
            self.proto.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
        self.refresh()

    def absorb_bias(self, node: Any, size: int) -> str:
        """The initializer [size] that the only reader of `node` adds to it; the Add goes. "" when there is none."""
        output = node.output[0]
        readers = self.consumers.get(output, [])
        if len(readers) != 1 or readers[0].op_type != "Add" or output in self.outputs:
            return ""
        add = readers[0]
        bias = next((name for name in add.input if name != output), "")
        if bias not in self.initializers or list(self.initializers[bias].dims) != [size]:
            return ""
        node.output[0] = add.output[0]
        self.proto.graph.node.remove(add)
        self.refresh()
        return str(bias)

    def cast_output(self, node: Any, kind: int) -> None:
        """Put a Cast behind a node."""
        import onnx

        output = node.output[0]
        node.output[0] = f"{output}.narrow"
        cast = onnx.helper.make_node("Cast", [node.output[0]], [output], name=f"{node.name or output}.wide", to=kind)
        self.proto.graph.node.insert(list(self.proto.graph.node).index(node) + 1, cast)
        self.refresh()

    def reshaped(self, name: str, shape: tuple[int, ...]) -> str:
        """The initializer `name` with other dimensions: a Reshape at the start of the graph, removed when unused."""
        import onnx

        dims = onnx.numpy_helper.from_array(np.array(shape, np.int64), f"{name}.shape")
        self.initializers[dims.name] = dims
        node = onnx.helper.make_node("Reshape", [name, dims.name], [f"{name}.blocks"], name=f"{name}.blocks")
        self.proto.graph.node.insert(0, node)
        self.refresh()
        return str(node.output[0])

    def prune(self) -> None:
        """Remove Transposes and other nodes whose outputs nobody reads any more."""
        while True:
            self.refresh()
            dead = [
                node
                for node in self.proto.graph.node
                if not any(name in self.consumers or name in self.outputs for name in node.output)
            ]
            if not dead:
                return
            for node in dead:
                self.proto.graph.node.remove(node)


def _captured(node: Any) -> set[str]:
    """Names that a node's subgraphs (If, Loop, Scan) read."""
    names: set[str] = set()
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            for inner in graph.node:
                names |= {name for name in inner.input if name} | _captured(inner)
    return names
