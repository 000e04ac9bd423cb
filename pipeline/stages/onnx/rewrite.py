"""Read an exported graph without its weights and edit its nodes by name."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.stages.checkpoint import Tensor
from pipeline.stages.onnx.sources import BFLOAT16, FLOAT, FLOAT16, Stacked, find_source

MICROSOFT = "com.microsoft"


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

    def source(self, name: str) -> Tensor:
        """Where an initializer's bytes are; those of a stack are in several places."""
        tensor = self.initializers[name]
        if name not in self._stacks:
            return find_source(tensor, self.path, self.folders)
        parts = tuple(self.source(part) for part in self._stacks[name])
        length = sum(part.length for part in parts)
        return Stacked(name, parts[0].dtype, tuple(tensor.dims), parts[0].path, 0, length, parts)

    def stack(self, name: str, parts: tuple[str, ...]) -> str:
        """A new initializer: the given ones above each other. They must have one type and one width."""
        import onnx

        first = self.initializers[parts[0]]
        rows = sum(self.initializers[part].dims[0] for part in parts)
        self.initializers[name] = onnx.TensorProto(name=name, dims=[rows, *first.dims[1:]], data_type=first.data_type)
        self._stacks[name] = parts
        return name

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
