"""Decide what each initializer of a graph becomes at a precision, edit the graph so, and stream the bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.errors import RecipeError, UnavailableError
from pipeline.stages.checkpoint import FLOATS, Tensor
from pipeline.stages.onnx_half import LARGEST, half, halve
from pipeline.stages.onnx_nbits import F32, Algorithm, quantize, shapes
from pipeline.stages.onnx_rewrite import FLOAT, FLOAT16, ExportedGraph, Linear
from pipeline.stages.onnx_sink import Sink
from pipeline.step import Progress

BITS = {"int8": 8, "int4": 4}
_NAMES = {1: "fp32", 10: "fp16", 11: "fp64", 16: "bf16"}
_LAYER = re.compile(r"\blayers?\.(\d+)\.")
_SENSITIVE = re.compile(r"\.(v_proj|qkv_proj|down_proj)\b")
_SMALLEST = 4096
"""Products with fewer weights than this are left alone: there is nothing to gain."""

_SLICE_BYTES = 1 << 20
"""Quantization works on slices of this size, so that its passes stay in the cache."""
_COPY_BYTES = 16 << 20
_UINT8 = 2


class Options(Protocol):
    """The fields of WeightOptions that are read here."""

    @property
    def precision(self) -> str: ...
    @property
    def group_size(self) -> int: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def algorithm(self) -> str: ...
    @property
    def accuracy_level(self) -> int: ...
    @property
    def head(self) -> str: ...
    @property
    def embeddings(self) -> str: ...
    @property
    def exclude(self) -> tuple[str, ...]: ...


class Placer:
    """One graph on its way to its final form."""

    def __init__(self, path: Path, model: Path, options: Options) -> None:
        self.options = options
        self.graph = ExportedGraph(path, model)
        self.jobs: list[tuple[int, Callable[[Sink], None]]] = []
        self.counts: dict[str, list[int]] = {}
        self.packed: dict[tuple[str, bool, int], list[str]] = {}

    def write(self, path: Path, progress: Progress) -> dict[str, Any]:
        """Write the graph and its weights. Returns facts for engine.json: bits per weight, tensors by type."""
        import onnx

        graph, sink = self.graph, Sink(path)
        self.widened = graph.drop_casts()
        linears = graph.linears()
        plan = placement(linears, graph.head(), self.options) if self.options.precision in BITS else {}
        linears = self._pack_attention(linears, plan)
        self._quantize(sink, linears, plan)
        graph.prune()
        if self.options.precision == "fp16":
            halve(graph)
        else:
            self._narrow_tables()
        self._copy(sink)
        total = sum(size for size, _ in self.jobs)
        done = 0
        with sink:
            for size, job in self.jobs:
                job(sink)
                done += size
                progress(done, total, "weights")
        del graph.proto.graph.initializer[:]
        graph.proto.graph.initializer.extend(sink.protos())
        del graph.proto.graph.value_info[:]
        onnx.save_model(graph.proto, path)
        return self._facts()

    def _facts(self) -> dict[str, Any]:
        weights = sum(elements for elements, _, _ in self.counts.values())
        size = sum(size for _, size, _ in self.counts.values())
        return {
            "bits_per_weight": round(size * 8 / weights, 4),
            "tensors": {kind: count for kind, (_, _, count) in sorted(self.counts.items())},
        }

    def _count(self, kind: str, elements: int, size: int) -> None:
        for index, amount in enumerate((elements, size, 1)):
            self.counts.setdefault(kind, [0, 0, 0])[index] += amount

    # what is not quantized

    def _narrow_tables(self) -> None:
        """Tables that are only looked up stay in the 16 bits that the checkpoint has: exact, and half the bytes."""
        graph = self.graph
        for name, proto in graph.initializers.items():
            readers = graph.consumers.get(name, [])
            if name not in self.widened or len(proto.dims) != 2:
                continue
            if readers and all(node.op_type == "Gather" and node.input[0] == name for node in readers):
                self.widened.remove(name)
                for node in readers:
                    graph.cast_output(node, FLOAT)

    def _copy(self, sink: Sink) -> None:
        """Declare every initializer that the graph still reads."""
        graph = self.graph
        for name, proto in graph.initializers.items():
            if name not in graph.consumers and name not in graph.outputs:
                continue
            source = graph.source(name)
            kind = FLOAT if name in self.widened else proto.data_type
            if self.options.precision == "fp16" and kind == FLOAT:
                kind = FLOAT16
            size = sink.declare(name, source.shape, kind)
            self.jobs.append((source.length, partial(_stream, source=source, kind=kind)))
            if source.dtype in FLOATS:
                self._count(_NAMES[kind], source.elements, size)

    # what is quantized

    def _pack_attention(self, linears: list[Linear], plan: dict[str, int]) -> list[Linear]:
        """One product for query, key and value where all three have the same type: two launches less a layer."""
        gone: dict[str, Linear | None] = {}
        for attention, three, biases in self.graph.attentions(linears):
            outputs = [linear.node.output[0] for linear in three]
            if len({plan.get(output, 0) for output in outputs}) == 1:
                weights = {linear.weight for linear in three}
                gone |= dict.fromkeys(outputs[1:])
                gone[outputs[0]] = self.graph.pack(attention, three, biases)
                if weights <= self.widened:
                    self.widened.add(f"{attention.name}.qkv_proj.weight")
                if biases and set(biases) <= self.widened:
                    self.widened.add(f"{attention.name}.qkv_proj.bias")
        self.graph.prune()
        kept = (gone.get(linear.node.output[0], linear) for linear in linears)
        return [linear for linear in kept if linear is not None]

    def _quantize(self, sink: Sink, linears: list[Linear], plan: dict[str, int]) -> None:
        if self.options.precision in BITS and self.options.embeddings != "keep":
            self._quantize_tables(sink)
        for linear in linears:
            bits = plan.get(linear.node.output[0], 0)
            if bits:
                names = self._packed(sink, linear.weight, linear.transposed, linear.n, linear.k, bits)
                self._replace(linear, names, bits)

    def _replace(self, linear: Linear, names: list[str], bits: int) -> None:
        """Turn the product into MatMulNBits, with the bias that an Add behind it has, if any."""
        graph, node = self.graph, linear.node
        bias = linear.bias or graph.absorb_bias(node, linear.n)
        inputs = [node.input[0], *names, *[""] * (3 - len(names)), "", bias]
        while not inputs[-1]:
            inputs.pop()
        graph.become(
            node,
            "MatMulNBits",
            inputs,
            K=linear.k,
            N=linear.n,
            bits=bits,
            block_size=self.options.group_size,
            accuracy_level=self.options.accuracy_level,
        )

    def _quantize_tables(self, sink: Sink) -> None:
        """Embedding tables become GatherBlockQuantized. A tied head of the same type shares the bytes: it reads them
        through a Reshape, since it packs them anew at load, where the table is read in place."""
        graph, group = self.graph, self.options.group_size
        bits = BITS[self.options.precision if self.options.embeddings == "same" else self.options.embeddings]
        for node in graph.tables():
            weight = node.input[0]
            n, k = graph.initializers[weight].dims
            if k % group:
                raise RecipeError(
                    f"embeddings: the width {k} of '{weight}' is no multiple of group_size {group}",
                    hint="choose a group_size that divides it, or embeddings: keep",
                )
            names = self._packed(sink, weight, True, n, k, bits, flat=True)
            key = (weight, True, bits)
            self.packed[key] = [graph.reshaped(names[0], shapes(n, k, bits, group)[0]), *names[1:]]
            inputs = [names[0], node.input[1], *names[1:]]
            attributes = {"bits": bits, "block_size": group, "gather_axis": 0, "quantize_axis": 1}
            graph.become(node, "GatherBlockQuantized", inputs, **attributes)

    def _packed(
        self, sink: Sink, weight: str, transposed: bool, n: int, k: int, bits: int, flat: bool = False
    ) -> list[str]:
        """Names of the quantized initializers of a weight: packed, scales and, when asymmetric, zeros. `flat` declares
        the first with two dimensions."""
        key = (weight, transposed, bits)
        if key in self.packed:
            return self.packed[key]
        group, symmetric = self.options.group_size, self.options.symmetric
        packed: tuple[int, ...]
        packed, scales, zeros = shapes(n, k, bits, group)
        base = f"{weight.removesuffix('.weight')}.int{bits}"
        names = [f"{base}.packed", f"{base}.scales"]
        if flat:
            packed = (n, packed[1] * packed[2])
        size = sink.declare(names[0], packed, _UINT8) + sink.declare(names[1], scales, FLOAT)
        if not symmetric:
            names.append(f"{base}.zeros")
            size += sink.declare(names[2], zeros, _UINT8)
        algorithm: Algorithm = "rtn" if self.options.algorithm == "rtn" else "k_quant"
        settings = (bits, group, symmetric, algorithm)
        source = self.graph.source(weight)
        job = _quantize_rows if transposed else _quantize_columns
        self.jobs.append((source.length, partial(job, names=names, source=source, settings=settings)))
        self._count(f"int{bits}", n * k, size)
        self.packed[key] = names
        return names


def placement(linears: list[Linear], head: str, options: Options) -> dict[str, int]:
    """Output name of a product -> its bits; what is left in fp32 is not there."""
    bits = BITS[options.precision]
    plan: dict[str, int] = {}
    unmatched = set(options.exclude)
    for linear in linears:
        output, names = linear.node.output[0], (linear.node.name, linear.weight, linear.weight.removesuffix(".weight"))
        matches = {pattern for pattern in options.exclude if any(fnmatch(name, pattern) for name in names)}
        unmatched -= matches
        if not matches and linear.n * linear.k >= _SMALLEST:
            plan[output] = bits
    if unmatched:
        some = ", ".join(f"'{linear.node.name or linear.weight}'" for linear in linears[:3])
        raise RecipeError(
            f"exclude: '{sorted(unmatched)[0]}' matches no matrix product of the graph", hint=f"names are like {some}"
        )
    if options.algorithm == "k_quant_mixed":
        for output in _sensitive(linears):
            if output in plan:
                plan[output] = max(bits, 8)
        if head in plan and options.head == "same":
            plan[head] = 8
    if head in plan and options.head != "same":
        plan[head] = BITS.get(options.head, 0)
    return plan


def _sensitive(linears: list[Linear]) -> list[str]:
    """Products that lose most by 4 bits: values and down projections of the first and last eighth of the layers and of
    every third layer between."""
    found = []
    layers = [
        int(match[1]) if (match := _LAYER.search(linear.node.name or linear.weight)) else -1 for linear in linears
    ]
    count = max(layers, default=-1) + 1
    if count == 0:
        raise UnavailableError(
            "algorithm k_quant_mixed: the exported graph does not say which product belongs to which layer",
            hint="use algorithm k_quant, or the fused exporter",
        )
    for linear, layer in zip(linears, layers, strict=True):
        outer = layer < count // 8 or layer >= count - max(1, count // 8) or (layer - count // 8) % 3 == 2
        if layer >= 0 and outer and _SENSITIVE.search(linear.node.name or linear.weight):
            found.append(linear.node.output[0])
    return found


def _stream(sink: Sink, source: Tensor, kind: int) -> None:
    """Copy a tensor as the TensorProto type `kind`; floats are checked as they pass."""
    offset, rows = 0, source.shape[0] if source.shape else 1
    step = max(1, _COPY_BYTES * rows // max(1, source.length))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if kind == FLOAT:
            values = source.rows(start, stop)
        elif kind == FLOAT16 and source.dtype != "F16":
            values = _halved(source, source.rows(start, stop))
        else:
            values = source.rows(start, stop, "native")
        sink.write(source.name, values, offset)
        offset += values.nbytes


def _halved(source: Tensor, values: F32) -> npt.NDArray[np.float16]:
    # A single number is a mask's "minus infinity"; anything larger is a weight.
    if source.elements > 1 and max(values.max(), -values.min()) > LARGEST:
        raise UnavailableError(
            f"{source.path.name}: tensor '{source.name}' has values beyond fp16's range (65504)",
            hint="use precision fp32, int8 or int4",
        )
    return np.asarray(half(values), dtype=np.float16)


Settings = tuple[int, int, bool, Algorithm]
"""bits, group, symmetric, algorithm"""


def _quantize_rows(sink: Sink, names: list[str], source: Tensor, settings: Settings) -> None:
    """A weight stored [N, K]: slice after slice of rows goes straight to its place."""
    bits, group, symmetric, algorithm = settings
    offsets = [0] * len(names)
    for _, weight_NK in source.slices(_SLICE_BYTES):
        parts = quantize(weight_NK, bits, group, symmetric=symmetric, algorithm=algorithm)
        for index, part in enumerate(part for part in parts if part is not None):
            sink.write(names[index], part, offsets[index])
            offsets[index] += part.nbytes


def _quantize_columns(sink: Sink, names: list[str], source: Tensor, settings: Settings) -> None:
    """A weight stored [K, N]: slices of K hold every row's next blocks, so the packed whole is put together first."""
    bits, group, symmetric, algorithm = settings
    k, n = source.shape
    whole = [
        np.zeros(shape, np.float32 if index == 1 else np.uint8) for index, shape in enumerate(shapes(n, k, bits, group))
    ]
    step = 2 * group * max(1, _COPY_BYTES // (8 * n * group))  # two blocks: 4-bit zero points come in pairs
    for start in range(0, k, step):
        weight_KN = source.rows(start, min(k, start + step))
        rows = max(1, _SLICE_BYTES // (4 * weight_KN.shape[0]))
        for first in range(0, n, rows):
            weight_NK = np.ascontiguousarray(weight_KN[:, first : first + rows].T)
            parts = quantize(weight_NK, bits, group, symmetric=symmetric, algorithm=algorithm)
            for target, part, each in zip(whole, parts, (1, 1, bits / 8), strict=True):
                if part is not None:
                    block = int(start // group * each)
                    target[first : first + rows, block : block + part.shape[1]] = part
    for name, values in zip(names, whole, strict=False):
        sink.write(name, values)
