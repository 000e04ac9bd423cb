"""Decide what each initializer of a graph becomes at a precision, edit the graph so, and stream the bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.errors import RecipeError
from pipeline.step import Progress
from pipeline.stages.checkpoint import Tensor
from pipeline.stages.onnx_nbits import F32, Algorithm, quantize, shapes
from pipeline.stages.onnx_rewrite import BFLOAT16, FLOAT, FLOAT16, ExportedGraph, Linear
from pipeline.stages.onnx_sink import Sink

_SLICE_BYTES = 1 << 20
"""Quantization works on slices of this size, so that its passes stay in the cache."""
_UINT8 = 2


class Options(Protocol):
    """The fields of WeightOptions that are read here."""

    precision: str
    group_size: int
    symmetric: bool
    algorithm: str
    accuracy_level: int
    quantize_embeddings: bool
    quantize_head: bool
    exclude: tuple[str, ...]


class Placer:
    """One graph on its way to its final form."""

    def __init__(self, path: Path, model: Path, options: Options) -> None:
        self.options = options
        self.graph = ExportedGraph(path, model)
        self.jobs: list[tuple[int, Callable[[Sink], None]]] = []

    def write(self, path: Path, progress: Progress) -> dict[str, Any]:
        """Write the graph and its weights. Returns facts for engine.json: effective bits, tensors by type."""
        import onnx

        graph, sink = self.graph, Sink(path)
        graph.drop_casts()
        self.counts: dict[str, list[int]] = {}
        if self.options.precision in ("int8", "int4"):
            self._quantize(sink)
        graph.prune()
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
        bits = sum(size for _, size, _ in self.counts.values())
        return {
            "bits_per_weight": round(bits * 8 / weights, 4) if weights else 0,
            "tensors": {kind: count for kind, (_, _, count) in sorted(self.counts.items())},
        }

    def _count(self, kind: str, elements: int, size: int) -> None:
        entry = self.counts.setdefault(kind, [0, 0, 0])
        entry[0] += elements
        entry[1] += size
        entry[2] += 1

    # what stays as it is

    def _copy(self, sink: Sink) -> None:
        """Declare every initializer that the graph still reads; floats of 16 bits become fp32."""
        graph = self.graph
        for name, proto in graph.initializers.items():
            if name not in graph.consumers and name not in graph.outputs:
                continue
            kind = proto.data_type
            if not graph.is_external(name):
                values = graph.inline_values(name)
                sink.declare(name, tuple(proto.dims), kind)
                self.jobs.append((values.nbytes, lambda sink, name=name, values=values: sink.write(name, values)))
                continue
            source = graph.source(name)
            wide = kind in (FLOAT16, BFLOAT16)
            sink.declare(name, source.shape, FLOAT if wide else kind)
            self.jobs.append((source.length, lambda sink, source=source: _stream(sink, source)))

    def _quantize(self, sink: Sink) -> None:
        raise NotImplementedError


def _stream(sink: Sink, source: Tensor) -> None:
    """Copy a tensor, floats as fp32."""
    offset = 0
    for values in _pieces(source):
        sink.write(source.name, values, offset)
        offset += values.nbytes


def _pieces(source: Tensor) -> Iterator[Any]:
    if source.dtype in ("F32", "F16", "BF16"):
        for _, values in source.slices():
            yield values
    else:
        yield source.numpy("native")
