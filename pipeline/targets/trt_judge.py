"""The typed graph on ONNX Runtime: what stands for an engine where no GPU can run it.

ONNX Runtime reads the very file that TensorRT compiles. It multiplies fp16 in fp32 and rounds between operators, it
runs Q/DQ as integers where it has kernels, and block-wise int4 exactly. It has no bf16 products: such a graph is made
fp32 first, with every result rounded to bf16.

Legend: B rows, S tokens fed at once, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engine import Array, Engine
from pipeline.errors import StageError, UnavailableError
from pipeline.stages.checkpoint import read_json
from pipeline.targets.ort_cache import cache_names
from pipeline.targets.ort_decoder import Shape
from pipeline.targets.ort_engine import OrtModel
from pipeline.targets.ort_session import Graph, as_float32
from pipeline.targets.ort_settings import CPU, CUDA, Settings
from pipeline.targets.static_decoder import StaticDecoder

_BATCH = 64
_CHUNK = 512


def open_engine(folder: Path, settings: Mapping[str, Any] | None = None) -> Engine:
    """An Engine over the typed graph in a folder of stage tensorrt.graph. `settings` may name the provider and
    `threads`. StageError where it does not load, UnavailableError where onnxruntime is not here."""
    engine = read_json(folder / "engine.json")
    session = _Session(folder / "model.onnx", widened=engine["precision"] == "bf16", **(settings or {}))
    if engine["kind"] == "encoder":
        return OrtModel(session)
    return StaticDecoder(_OrtStatic(session), Shape.read(engine["decoder"]))


class _Session(Graph):
    """A session with exact int4 products; opened from bytes where the graph had to be widened."""

    def __init__(self, file: Path, *, widened: bool, provider: str = CPU, threads: int = 0) -> None:
        import onnxruntime

        self.file, self.device, self.device_id = file, "cuda" if provider == CUDA else "cpu", 0
        if provider not in onnxruntime.get_available_providers():
            raise UnavailableError(f"the installed onnxruntime has no {provider}", hint="use the CPU provider")
        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = Settings(threads=threads).threads
        # Level 1 multiplies in fp32. The default quantizes activations to int8, which no GPU does to this graph.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        try:
            source = widen(file) if widened else str(file)
            self.session = onnxruntime.InferenceSession(source, options, providers=[provider])
        except MemoryError:
            raise
        except Exception as error:  # onnxruntime's errors share no base class but Exception
            raise StageError(
                f"{file.name}: ONNX Runtime {onnxruntime.__version__} cannot load the typed graph: "
                f"{(str(error).strip() or type(error).__name__).splitlines()[0]}"
            ) from error
        self.inputs = {arg.name: arg for arg in self.session.get_inputs()}
        self.outputs = {arg.name: arg for arg in self.session.get_outputs()}


class _OrtStatic:
    """A graph with a static cache in ONNX Runtime; nothing bounds its batch."""

    largest_batch, chunk = _BATCH, _CHUNK

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.names = cache_names(graph)

    def buffers(self, batch: int) -> _OrtBuffers:
        return _OrtBuffers(self, batch)


class _OrtBuffers:
    def __init__(self, owner: _OrtStatic, batch: int) -> None:
        self._graph, self._names = owner.graph, owner.names
        shapes = {name: (batch, *self._graph.inputs[name].shape[1:]) for name in self._names}
        self.caches: dict[str, Array] = {n: np.zeros(s, self._graph.dtype(n)) for n, s in shapes.items()}

    def forward(self, ids_BS: Array, places_B: Array) -> Array:
        feeds = {"input_ids": ids_BS.astype(np.int64), "write_indices": places_B.astype(np.int64), **self.caches}
        names = ["logits", *self._names.values()]
        logits, *caches = self._graph.call(lambda: self._graph.session.run(names, feeds))
        self.caches = dict(zip(self._names, caches, strict=True))
        return as_float32(logits)

    def reorder(self, rows: Sequence[int]) -> None:
        self.caches = {name: cache[list(rows)] for name, cache in self.caches.items()}

    def put(self, row: int, other: _OrtBuffers) -> None:
        for name, cache in self.caches.items():
            cache[row] = other.caches[name][0]


def widen(file: Path) -> bytes:
    """A bf16 graph as an fp32 one that rounds every result to bf16: for runtimes without bf16 products."""
    import onnx

    model = onnx.load_model(file)
    typed = onnx.shape_inference.infer_shapes(model)
    kinds = {value.name: value.type.tensor_type.elem_type for value in typed.graph.value_info}
    wide, bf16 = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
    graph = model.graph
    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.elem_type == bf16:
            value.type.tensor_type.elem_type = wide
            kinds[value.name] = bf16
    for tensor in graph.initializer:
        if tensor.data_type == bf16:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    nodes = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == bf16:
                attribute.i = wide
            if attribute.HasField("t") and attribute.t.data_type == bf16:
                array = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(array))
        nodes.append(node)
        for index, name in enumerate(node.output):
            if kinds.get(name) == bf16:
                node.output[index] = f"{name}.exact"
                nodes.append(onnx.helper.make_node("Cast", [f"{name}.exact"], [f"{name}.narrow"], to=bf16))
                nodes.append(onnx.helper.make_node("Cast", [f"{name}.narrow"], [name], to=wide))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    data: bytes = model.SerializeToString()
    return data
