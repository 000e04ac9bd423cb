"""Rewrite a graph for TensorRT's strong types: Q/DQ nodes around products, block-wise DQ before them, 16-bit floats.

Weights stream from where the export has them to their place; peak memory is a few times the largest of them. Scales are
symmetric about 0, because TensorRT takes no zero points.

Legend: K input channels, N output channels, G weights that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import RecipeError
from pipeline.stages.checkpoint import Tensor, read_json
from pipeline.stages.onnx.half import halve, narrow
from pipeline.stages.onnx.int8 import Int8Options
from pipeline.stages.onnx.int8_observe import Observed, observe
from pipeline.stages.onnx.patterns import Linear, head, linears
from pipeline.stages.onnx.rewrite import ExportedGraph
from pipeline.stages.onnx.sink import Sink
from pipeline.stages.onnx.sources import BFLOAT16, FLOAT, FLOAT16
from pipeline.stages.onnx.stream import stream
from pipeline.stages.tensorrt.graph import QUANTIZED, GraphOptions
from pipeline.step import Inputs, Progress

F32 = npt.NDArray[np.float32]

LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}
"""Of a quantized magnitude; int4 has -8 as well, which only blocks whose largest weight is negative may use."""
_KINDS = {"int8": 3, "fp8": 17, "int4": 22}
"""TensorProto data types."""
_FLOATS = {"fp32": FLOAT, "fp16": FLOAT16, "bf16": BFLOAT16}
_SMALLEST = 1024
"""Products with fewer weights than this are left alone: there is nothing to gain."""
_SMALLEST_SCALE = 2.0**-20
"""Scales are rounded to fp16 first and used as rounded; below this, fp16 would have too few bits left."""
_ROWS = 512
"""Of a weight that are quantized at once."""


class TypedGraph:
    """An exported graph on its way to strong types."""

    def __init__(self, path: Path, model: Path, options: GraphOptions) -> None:
        self.options = options
        self.graph = ExportedGraph(path, model)
        self.widened = self.graph.drop_casts()
        self.quantized = options.precision in QUANTIZED
        self.kind = _FLOATS[options.rest if self.quantized else options.precision]
        self.linears = self._chosen() if self.quantized else []
        self.small: dict[str, F32] = {}
        self.jobs: list[tuple[int, Callable[[Sink], None]]] = []
        self.declared: dict[str, tuple[tuple[int, ...], int]] = {}

    @property
    def activations(self) -> tuple[str, ...]:
        """Every tensor that feeds a quantized product."""
        return tuple(dict.fromkeys(linear.node.input[0] for linear in self.linears))

    def _chosen(self) -> list[Linear]:
        options, last = self.options, head(self.graph)
        found = linears(self.graph)
        unmatched, chosen = set(options.exclude), []
        for linear in found:
            names = (linear.node.name, linear.weight, self._module(linear))
            matches = {pattern for pattern in options.exclude if any(fnmatch(name, pattern) for name in names)}
            unmatched -= matches
            kept = linear.node.output[0] == last and options.precision == "int4" and options.head == "keep"
            blocked = options.precision != "int4" or linear.k % options.group_size == 0
            if not matches and not kept and blocked and linear.n * linear.k >= _SMALLEST:
                chosen.append(linear)
        if unmatched:
            some = ", ".join(f"'{self._module(linear)}'" for linear in found[:3])
            raise RecipeError(
                f"exclude: '{sorted(unmatched)[0]}' matches no matrix product of the graph",
                hint=f"names are like {some}",
            )
        if not chosen:
            raise RecipeError(
                f"precision {options.precision}: the graph has no product that it could quantize",
                hint="its products are excluded, too small, or not a multiple of group_size wide: use fp16",
            )
        return chosen

    def _module(self, linear: Linear) -> str:
        """The module of a product. Where an exporter folded a weight's transposition, the bias still has the name."""
        if "." in linear.weight:
            return linear.weight.removesuffix(".weight")
        for reader in self.graph.consumers.get(linear.node.output[0], ()):
            for name in reader.input:
                if reader.op_type == "Add" and name in self.graph.initializers and name.endswith(".bias"):
                    return str(name.removesuffix(".bias"))
        return linear.weight

    def write(self, path: Path, observed: dict[str, Observed], progress: Progress) -> dict[str, Any]:
        """Write the graph and its weights. Returns facts for engine.json: what was quantized."""
        import onnx

        graph, proto = self.graph, self.graph.proto
        kept = {linear.node.output[0] for linear in linears(graph)} if self.quantized else set()
        self._rewrite(observed)
        graph.prune()
        if self.kind != FLOAT:
            halve(graph, self.kind)
        sink = Sink(path)
        for name, tensor in graph.initializers.items():
            if name in graph.consumers or name in graph.outputs:
                kind = FLOAT if name in self.widened else tensor.data_type
                kind = self.kind if kind == FLOAT else kind
                source = graph.source(name)
                sink.declare(name, source.shape, kind)
                self.jobs.append((source.length, partial(stream, source=source, kind=kind)))
        for name, (dims, kind) in self.declared.items():
            sink.declare(name, dims, kind)
        for name, array in self.small.items():
            sink.declare(name, array.shape, self.kind)
        done, total = 0, sum(size for size, _ in self.jobs)
        with sink:
            for size, job in self.jobs:
                job(sink)
                done += size
                progress(done, total, "weights")
            for name, array in self.small.items():
                sink.write(name, self._narrow(array))
        del proto.graph.initializer[:], proto.graph.value_info[:]
        sink.move_into(proto.graph.initializer)
        onnx.save_model(proto, path)
        if not self.quantized:
            return {}
        facts: dict[str, Any] = {"products": len(self.linears), "products_kept": len(kept) - len(self.linears)}
        return facts | ({"group_size": self.options.group_size} if self.options.precision == "int4" else {})

    def _narrow(self, array: F32) -> npt.NDArray[Any]:
        return array if self.kind == FLOAT else np.asarray(narrow(array, self.kind))

    # nodes

    def _rewrite(self, observed: dict[str, Observed]) -> None:
        replaced = {linear.node.output[0]: linear for linear in self.linears}
        nodes: list[Any] = []
        written: set[str] = set()
        for node in self.graph.proto.graph.node:
            linear = replaced.get(node.output[0])
            if linear is None:
                nodes.append(node)
                continue
            if self.options.precision != "int4" and node.input[0] not in written:
                written.add(node.input[0])
                nodes += self._activation(node.input[0], observed[node.input[0]])
            nodes += self._product(linear)
        del self.graph.proto.graph.node[:]
        self.graph.proto.graph.node.extend(nodes)
        self.graph.refresh()

    def _activation(self, name: str, observed: Observed) -> list[Any]:
        from onnx.helper import make_node

        kind = _KINDS[self.options.precision]
        largest = max(-observed.low, observed.high) / LARGEST[self.options.precision]
        self.small[f"{name}.scale"] = np.array(max(largest, _SMALLEST_SCALE), np.float32)
        scale, zero = f"{name}.scale", f"{name}.zero"
        self.declared[zero] = ((), kind)
        self.jobs.append((0, lambda sink: sink.write(zero, np.zeros(1, np.uint8))))
        low, wide = f"{name}.{self.options.precision}", f"{name}.wide"
        return [
            make_node("QuantizeLinear", [name, scale, zero], [low], name=f"{name}.quantize"),
            make_node("DequantizeLinear", [low, scale, zero], [wide], name=wide),
        ]

    def _product(self, linear: Linear) -> list[Any]:
        from onnx.helper import make_node

        output, activation = linear.node.output[0], linear.node.input[0]
        base = linear.node.name or output
        last = f"{output}.product" if linear.bias else output
        weight, wide = self._weight(linear), f"{output}.weight"
        if self.options.precision == "int4":
            how = {"axis": 0, "block_size": self.options.group_size}
        else:
            how, activation = {"axis": 1}, f"{activation}.wide"
        nodes = [
            make_node("DequantizeLinear", [weight, f"{weight}.scale"], [wide], name=wide, **how),
            make_node("MatMul", [activation, wide], [last], name=base),
        ]
        if linear.bias:
            nodes.append(make_node("Add", [last, linear.bias], [output], name=f"{base}.bias"))
        return nodes

    def _weight(self, linear: Linear) -> str:
        """Name of the quantized weight [K, N]; its scales, [N] or [K / G, N], are called `name`.scale."""
        precision, group = self.options.precision, self.options.group_size
        name = f"{self._module(linear)}.{precision}"
        if name not in self.declared:
            source = self.graph.source(linear.weight)
            blocks = (linear.k // group,) if precision == "int4" else ()
            self.declared[name] = ((linear.k, linear.n), _KINDS[precision])
            self.declared[f"{name}.scale"] = ((*blocks, linear.n), self.kind)
            job = self._write_int4 if precision == "int4" else self._write_channels
            self.jobs.append((source.length, partial(job, name, source, linear.transposed)))
        return name

    # weights

    def _write_channels(self, name: str, source: Tensor, transposed: bool, sink: Sink) -> None:
        """int8 or fp8 with a scale for every output channel, which is rounded first and used as rounded."""
        top = LARGEST[self.options.precision]
        whole_KN = np.empty((source.shape[1], source.shape[0]) if transposed else source.shape, np.uint8)
        scales_N = np.empty(whole_KN.shape[1], np.float32)
        for first, weight_NK in _channels(source, transposed):
            scales = np.maximum(np.abs(weight_NK).max(1) / top, _SMALLEST_SCALE).astype(np.float32)
            scales = self._narrow(scales).astype(np.float32)
            stop = first + len(weight_NK)
            scales_N[first:stop] = scales
            whole_KN[:, first:stop] = _bits(weight_NK / scales[:, None], self.options.precision).T
        sink.write(name, whole_KN)
        sink.write(f"{name}.scale", self._narrow(scales_N))

    def _write_int4(self, name: str, source: Tensor, transposed: bool, sink: Sink) -> None:
        """int4 with a scale for every block of G along K; two values lie in a byte, the first in the low half."""
        group = self.options.group_size
        k, n = (source.shape[1], source.shape[0]) if transposed else source.shape
        whole_KN = np.empty((k, n), np.int8)
        scales_BN = np.empty((k // group, n), np.float32)
        for first, weight_NK in _channels(source, transposed):
            stop = first + len(weight_NK)
            blocks_NBG = weight_NK.reshape(len(weight_NK), k // group, group)
            scales_NB = block_scales(blocks_NBG, search=self.options.search)
            scales_NB = self._narrow(scales_NB).astype(np.float32)
            q_NBG = np.clip(np.rint(blocks_NBG / scales_NB[..., None]), -8, 7)
            whole_KN[:, first:stop] = q_NBG.reshape(len(weight_NK), k).T
            scales_BN[:, first:stop] = scales_NB.T
        flat = whole_KN.reshape(-1).view(np.uint8)
        if flat.size % 2:
            flat = np.append(flat, np.uint8(0))
        sink.write(name, (flat[0::2] & 15) | ((flat[1::2] & 15) << 4))
        sink.write(f"{name}.scale", self._narrow(scales_BN))


def _channels(source: Tensor, transposed: bool) -> Iterator[tuple[int, F32]]:
    """(first output channel, weight [n, K]) from the start to the end."""
    if transposed:
        for first in range(0, source.shape[0], _ROWS):
            yield first, source.rows(first, min(first + _ROWS, source.shape[0]))
        return
    whole_KN = source.numpy()
    for first in range(0, whole_KN.shape[1], _ROWS):
        yield first, np.ascontiguousarray(whole_KN[:, first : first + _ROWS].T)


def _bits(scaled: F32, precision: str) -> npt.NDArray[np.uint8]:
    """Quantized values as the bytes that ONNX stores."""
    if precision == "int8":
        return np.clip(np.rint(scaled), -127, 127).astype(np.int8).view(np.uint8)
    import ml_dtypes

    return np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def block_scales(blocks_NBG: F32, *, search: bool) -> F32:
    """Scales [N, B] of int4 blocks, positive: of the largest magnitude, or the best of some smaller ones.

    What counts is the squared error weighted by the weight's own square, so that large weights stay exact.
    """
    largest = np.abs(blocks_NBG).max(-1)
    scales: F32 = np.maximum(largest / np.float32(7), np.float32(_SMALLEST_SCALE))
    if not search:
        return scales
    best: F32 = np.full(scales.shape, np.inf, np.float32)
    found = scales.copy()
    weight = blocks_NBG * blocks_NBG
    for share in np.linspace(7.0, 8.8, 10, dtype=np.float32):
        trial = np.maximum(largest / share, np.float32(_SMALLEST_SCALE))
        wrong = np.clip(np.rint(blocks_NBG / trial[..., None]), -8, 7) * trial[..., None] - blocks_NBG
        error = np.einsum("nbg,nbg->nb", weight, wrong * wrong)
        better = error < best
        best, found = np.where(better, error, best), np.where(better, trial, found)
    return found


def ranges(graph: TypedGraph, inputs: Inputs, options: GraphOptions, progress: Progress) -> dict[str, Observed]:
    """The range of every tensor that is quantized, over the calibration data. RecipeError where there are none."""
    export = read_json(inputs["export"] / "export.json")
    if "calibration" not in inputs:
        raise RecipeError(
            f"precision {options.precision}: the range of activations is measured on calibration data, and the recipe "
            "names none",
            hint="add a `calibration:` section with `path:`",
        )
    if export["interface"]["inputs"][0]["name"] != "input_ids":
        raise RecipeError("calibration data are text, and this model takes none", hint="use precision fp16")
    told = Int8Options(
        mode="static",
        calibration=options.calibration,
        percentile=options.percentile,
        samples=options.samples,
        length=options.length,
    )
    path = inputs["export"] / export["components"]["model"]
    return observe(path, list(graph.activations), inputs, told, progress)
