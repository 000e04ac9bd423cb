"""Rewrite the matrix products and embedding tables of a graph to int8, weight by weight.

Dynamic: DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul, which ONNX Runtime fuses into one kernel. Static:
QuantizeLinear -> DequantizeLinear before the product, DequantizeLinear behind its weight, which it fuses as well.

Legend: K input channels, N output channels, V rows of a table, D its width.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import RecipeError
from pipeline.stages.checkpoint import Tensor
from pipeline.stages.onnx.int8 import Int8Options
from pipeline.stages.onnx.int8_observe import Observed
from pipeline.stages.onnx.patterns import Linear, linears, tables
from pipeline.stages.onnx.rewrite import ExportedGraph
from pipeline.stages.onnx.sink import Sink
from pipeline.stages.onnx.stream import stream

F32 = npt.NDArray[np.float32]

_FLOAT = 1
_SMALLEST = 1024
"""Products with fewer weights than this are left alone: there is nothing to gain."""
_SMALLEST_RANGE = 1e-9
_ROWS = 256
"""Of a weight that are quantized at once."""


class Int8Graph:
    """One component of an export on its way to int8."""

    def __init__(self, path: Path, model: Path, options: Int8Options) -> None:
        self.options = options
        self.graph = ExportedGraph(path, model)
        self.widened = self.graph.drop_casts()
        self.linears = self._chosen()
        self.small: dict[str, npt.NDArray[Any]] = {}
        self.large: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Sink], None]]] = {}
        """Name of an int8 initializer -> its shape, that of its scales, and what writes both."""

    @property
    def activations(self) -> tuple[str, ...]:
        """Every tensor that feeds a product."""
        return tuple(dict.fromkeys(linear.node.input[0] for linear in self.linears))

    def _chosen(self) -> list[Linear]:
        found = linears(self.graph)
        unmatched = set(self.options.exclude)
        chosen = []
        for linear in found:
            names = (linear.node.name, linear.weight)
            matches = {pattern for pattern in self.options.exclude if any(fnmatch(name, pattern) for name in names)}
            unmatched -= matches
            if not matches and linear.n * linear.k >= _SMALLEST:
                chosen.append(linear)
        if unmatched and self.options.exclude:
            some = ", ".join(f"'{linear.weight}'" for linear in found[:3])
            raise RecipeError(
                f"exclude: '{sorted(unmatched)[0]}' matches no matrix product of {self.graph.path.name}",
                hint=f"names are like {some}",
            )
        return chosen

    def write(self, path: Path, observed: dict[str, Observed]) -> dict[str, Any]:
        """Write the graph and its weights. Returns facts for engine.json: what became int8."""
        graph, proto = self.graph, self.graph.proto
        replaced = {linear.node.output[0]: linear for linear in self.linears}
        looked_up = {node.output[0]: node for node in tables(graph)} if self.options.embeddings else {}
        written: set[str] = set()
        nodes: list[Any] = []
        for node in proto.graph.node:
            if linear := replaced.get(node.output[0]):
                activation = node.input[0]
                if activation not in written:
                    written.add(activation)
                    nodes += self._quantized_activation(activation, observed.get(activation))
                nodes += self._product(linear, *self._quantized_weight(linear))
            elif node.output[0] in looked_up:
                nodes += self._lookup(node)
            else:
                nodes.append(node)
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        graph.prune()
        self._save(path)
        kept = [linear for linear in linears(graph) if linear.n * linear.k >= _SMALLEST]
        return {"products": len(self.linears), "products_fp32": len(kept), "tables": len(looked_up)}

    def _save(self, path: Path) -> None:
        import onnx

        graph, proto = self.graph, self.graph.proto
        sink, copied = Sink(path), []
        for name, tensor in graph.initializers.items():
            if name in graph.consumers or name in graph.outputs:
                copied.append((graph.source(name), _FLOAT if name in self.widened else tensor.data_type))
                sink.declare(name, copied[-1][0].shape, copied[-1][1])
        for name, (shape, scales, _) in self.large.items():
            sink.declare(name, shape, onnx.TensorProto.INT8)
            sink.declare(f"{name}.scale", scales, _FLOAT)
        for name, array in self.small.items():
            sink.declare(name, array.shape, onnx.helper.np_dtype_to_tensor_dtype(array.dtype))
        with sink:
            for source, kind in copied:
                stream(sink, source, kind)
            for _, _, job in self.large.values():
                job(sink)
            for name, array in self.small.items():
                sink.write(name, array)
        del proto.graph.initializer[:], proto.graph.value_info[:]
        sink.move_into(proto.graph.initializer)
        onnx.save_model(proto, path)

    # weights

    def _quantized_weight(self, linear: Linear) -> tuple[str, str]:
        """Names of the int8 weight [K, N] and its scales, [N] or one number."""
        base = f"{linear.weight.removesuffix('.weight')}.int8" + (".transposed" if linear.transposed else "")
        if base not in self.large:
            source = self.graph.source(linear.weight)
            top = 63 if self.options.reduce_range else 127
            job = partial(_write_weight, base, source, linear.transposed, self.options.per_channel, top)
            self.large[base] = ((linear.k, linear.n), (linear.n,) if self.options.per_channel else (), job)
        return base, f"{base}.scale"

    # nodes

    def _quantized_activation(self, name: str, observed: Observed | None) -> list[Any]:
        from onnx.helper import make_node

        if self.options.mode == "dynamic":
            outputs = [f"{name}.int8", f"{name}.scale", f"{name}.zero"]
            return [make_node("DynamicQuantizeLinear", [name], outputs, name=f"{name}.quantize")]
        assert observed is not None
        scale, zero = _static_scale(observed, self.options)
        self.small[f"{name}.scale"], self.small[f"{name}.zero"] = scale, zero
        parameters = [f"{name}.scale", f"{name}.zero"]
        quantize = make_node("QuantizeLinear", [name, *parameters], [f"{name}.int8"], name=f"{name}.quantize")
        widen = make_node("DequantizeLinear", [f"{name}.int8", *parameters], [f"{name}.wide"], name=f"{name}.wide")
        return [quantize, widen]

    def _product(self, linear: Linear, weight: str, scale: str) -> list[Any]:
        from onnx.helper import make_node

        activation, output = linear.node.input[0], linear.node.output[0]
        base = linear.node.name or output
        last = f"{output}.product" if linear.bias else output
        if self.options.mode == "dynamic":
            nodes = [
                make_node(
                    "MatMulInteger",
                    [f"{activation}.int8", weight, f"{activation}.zero"],
                    [f"{output}.int32"],
                    name=f"{base}.int8",
                ),
                make_node("Cast", [f"{output}.int32"], [f"{output}.wide"], name=f"{base}.wide", to=_FLOAT),
                make_node("Mul", [f"{activation}.scale", scale], [f"{output}.scale"], name=f"{base}.scales"),
                make_node("Mul", [f"{output}.wide", f"{output}.scale"], [last], name=f"{base}.scale"),
            ]
        else:
            axis = {"axis": 1} if self.options.per_channel else {}
            wide = f"{output}.weight"
            nodes = [
                make_node("DequantizeLinear", [weight, scale], [wide], name=wide, **axis),
                make_node("MatMul", [f"{activation}.wide", wide], [last], name=base),
            ]
        if linear.bias:
            nodes.append(make_node("Add", [last, linear.bias], [output], name=f"{base}.bias"))
        return nodes

    def _lookup(self, node: Any) -> list[Any]:
        """A table [V, D] of int8 with a scale for every row: two lookups and their product."""
        from onnx.helper import make_node

        table, ids, output = node.input[0], node.input[1], node.output[0]
        base = f"{table.removesuffix('.weight')}.rows"
        if base not in self.large:
            source = self.graph.source(table)
            self.large[base] = (source.shape, (source.shape[0], 1), partial(_write_table, base, source))
        return [
            make_node("Gather", [base, ids], [f"{output}.int8"], name=f"{node.name}.int8"),
            make_node("Cast", [f"{output}.int8"], [f"{output}.wide"], name=f"{node.name}.wide", to=_FLOAT),
            make_node("Gather", [f"{base}.scale", ids], [f"{output}.scale"], name=f"{node.name}.scale"),
            make_node("Mul", [f"{output}.wide", f"{output}.scale"], [output], name=node.name),
        ]


def _write_weight(name: str, source: Tensor, transposed: bool, per_channel: bool, top: int, sink: Sink) -> None:
    """A weight [K, N] and the scales of its columns, symmetric about 0."""
    weight_KN: F32 = source.numpy()
    if transposed:
        weight_KN = np.ascontiguousarray(weight_KN.T)
    axis = 0 if per_channel else None
    largest = np.maximum(weight_KN.max(axis=axis), -weight_KN.min(axis=axis))
    scale = np.maximum(largest / top, _SMALLEST_RANGE).astype(np.float32)
    for start in range(0, len(weight_KN), _ROWS):
        part = np.rint(weight_KN[start : start + _ROWS] / scale).astype(np.int8)
        sink.write(name, part, start * weight_KN.shape[1])
    sink.write(f"{name}.scale", scale)


def _write_table(name: str, source: Tensor, sink: Sink) -> None:
    """A table [V, D] and the scale of every row."""
    for start, rows_VD in source.slices():
        largest = np.maximum(rows_VD.max(axis=1, keepdims=True), -rows_VD.min(axis=1, keepdims=True))
        scale_V1 = np.maximum(largest / 127, _SMALLEST_RANGE).astype(np.float32)
        sink.write(name, np.rint(rows_VD / scale_V1).astype(np.int8), start * source.shape[1])
        sink.write(f"{name}.scale", scale_V1, 4 * start)


def _static_scale(observed: Observed, options: Int8Options) -> tuple[F32, npt.NDArray[Any]]:
    """Scale and zero point of a range; 0 is always exact, because padding and masks are made of it."""
    low, high = min(observed.low, 0.0), max(observed.high, 0.0)
    if options.activations == "int8":
        scale = max(max(-low, high) / 127, _SMALLEST_RANGE)
        return np.array(scale, np.float32), np.array(0, np.int8)
    scale = max((high - low) / 255, _SMALLEST_RANGE)
    return np.array(scale, np.float32), np.array(np.clip(np.rint(-low / scale), 0, 255), np.uint8)
