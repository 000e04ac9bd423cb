"""Give a graph its weights at a precision: edit its nodes, then stream every initializer to its place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError
from pipeline.stages.checkpoint import FLOATS
from pipeline.stages.onnx.decoder import TABLES
from pipeline.stages.onnx.half import halve
from pipeline.stages.onnx.nbits import Algorithm, shapes
from pipeline.stages.onnx.patterns import Linear, head, pack, projections, tables
from pipeline.stages.onnx.patterns import linears as found_linears
from pipeline.stages.onnx.placement import BITS, Options, placement
from pipeline.stages.onnx.rewrite import ExportedGraph
from pipeline.stages.onnx.sink import Sink
from pipeline.stages.onnx.sources import FLOAT, FLOAT16
from pipeline.stages.onnx.stream import quantize_columns, quantize_rows, stream
from pipeline.step import Progress

_NAMES = {1: "fp32", 10: "fp16", 11: "fp64", 16: "bf16"}
_UINT8 = 2


class Placer:
    """One graph on its way to its final form."""

    def __init__(self, path: Path, model: Path, options: Options) -> None:
        self.options = options
        self.graph = ExportedGraph(path, model)
        self.half = options.precision == "fp16" or (options.precision in BITS and options.activations == "fp16")
        self.jobs: list[tuple[int, Callable[[Sink], None]]] = []
        self.counts: dict[str, list[int]] = {}
        self.packed: dict[tuple[str, bool, int], list[str]] = {}

    def write(self, path: Path, progress: Progress) -> dict[str, Any]:
        """Write the graph and its weights. Returns facts for engine.json: bits per weight, tensors by type."""
        import onnx

        graph, sink = self.graph, Sink(path)
        self.widened = graph.drop_casts()
        linears = found_linears(graph)
        plan = placement(linears, head(graph), self.options) if self.options.precision in BITS else {}
        linears = self._pack_attention(linears, plan)
        self._quantize(sink, linears, plan)
        graph.prune()
        if self.half:
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
        sink.move_into(graph.proto.graph.initializer)
        del graph.proto.graph.value_info[:]
        onnx.save_model(graph.proto, path)
        return self._facts()

    @property
    def inputs(self) -> list[str]:
        """Names of the graph's inputs."""
        return [value.name for value in self.graph.proto.graph.input]

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
            if self.half and kind == FLOAT:
                kind = FLOAT16
            size = sink.declare(name, source.shape, kind)
            self.jobs.append((source.length, partial(stream, source=source, kind=kind)))
            if source.dtype in FLOATS and not name.startswith(TABLES):
                self._count(_NAMES[kind], source.elements, size)

    # what is quantized

    def _pack_attention(self, linears: list[Linear], plan: dict[str, int]) -> list[Linear]:
        """One product for query, key and value where all three have the same type: two launches less a layer."""
        gone: dict[str, Linear | None] = {}
        for found in projections(self.graph, linears):
            outputs = [linear.node.output[0] for linear in found.products]
            if len({plan.get(output, 0) for output in outputs}) != 1:
                continue
            weights = {linear.weight for linear in found.products}
            packed = pack(self.graph, found)
            gone |= {**dict.fromkeys(outputs[1:]), outputs[0]: packed}
            for parts, name in ((weights, packed.weight), (set(found.biases), f"{packed.node.name}.bias")):
                if parts and parts <= self.widened:
                    self.widened.add(name)
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
        for node in tables(graph):
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
        size = sink.declare(names[0], packed, _UINT8) + sink.declare(names[1], scales, FLOAT16 if self.half else FLOAT)
        if not symmetric:
            names.append(f"{base}.zeros")
            size += sink.declare(names[2], zeros, _UINT8)
        algorithm: Algorithm = "rtn" if self.options.algorithm == "rtn" else "k_quant"
        settings = (bits, group, symmetric, algorithm, self.half)
        source = self.graph.source(weight)
        job = quantize_rows if transposed else quantize_columns
        self.jobs.append((source.length, partial(job, names=names, source=source, settings=settings)))
        self._count(f"int{bits}", n * k, size)
        self.packed[key] = names
        return names
