"""Turn a graph that computes in fp32 into one that computes in 16 bits: types of nodes, caches and the interface.

Caches (past, present, cross) become fp16 (or bf16); every other float input and output stays fp32 behind a Cast, so
callers see the same interface. Weights are not touched here: they are halved as they stream. CUDA multiplies in fp16;
on a CPU, ONNX Runtime keeps caches in fp16, widens the weights when it loads them and multiplies in fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.stages.onnx.rewrite import ExportedGraph
from pipeline.stages.onnx.sources import FLOAT, FLOAT16

CACHES = ("past_key_values.", "present.", "cross_key_values.")
LARGEST = float(np.finfo(np.float16).max)


def halve(graph: ExportedGraph, kind: int = FLOAT16) -> None:
    """Edit `graph` in place. Values beyond fp16's range in constants (masks) become its largest finite value.

    `kind` is FLOAT16 or BFLOAT16.
    """
    import onnx

    proto = graph.proto.graph
    before: list[Any] = []
    for value in proto.input:
        if value.type.tensor_type.elem_type == FLOAT and value.name in graph.consumers:
            if value.name.startswith(CACHES):
                value.type.tensor_type.elem_type = kind
            else:
                inner = f"{value.name}.fp16"
                graph.rename(value.name, inner)
                before.append(onnx.helper.make_node("Cast", [value.name], [inner], name=inner, to=kind))
    for node in proto.node:
        _retype(node, kind)
    for value in proto.output:
        if value.type.tensor_type.elem_type != FLOAT:
            continue
        if value.name.startswith(CACHES):
            value.type.tensor_type.elem_type = kind
        else:
            inner = f"{value.name}.fp16"
            producer = graph.producers[value.name]
            producer.output[list(producer.output).index(value.name)] = inner
            graph.rename(value.name, inner)
            proto.node.append(onnx.helper.make_node("Cast", [inner], [value.name], name=f"{inner}.wide", to=FLOAT))
    for node in reversed(before):
        proto.node.insert(0, node)
    graph.refresh()


def half(values: Any, largest: float = LARGEST) -> Any:
    """fp32 -> fp16, clipped to the finite range (for constants; weights are checked instead)."""
    return np.clip(values, -largest, largest).astype(np.float16)


def narrow(values: Any, kind: int) -> Any:
    """fp32 -> the type `kind`: fp16, clipped to its finite range, or bf16, rounded to nearest."""
    if kind == FLOAT16:
        return half(values)
    import ml_dtypes

    return np.asarray(values, np.float32).astype(ml_dtypes.bfloat16)


def _retype(node: Any, kind: int) -> None:
    import onnx

    for attribute in node.attribute:
        if attribute.name in ("to", "dtype", "stash_type") and attribute.i == FLOAT:
            if attribute.name != "stash_type":  # norms go on accumulating in fp32
                attribute.i = kind
        elif attribute.HasField("t") and attribute.t.data_type == FLOAT:
            array = narrow(onnx.numpy_helper.to_array(attribute.t), kind)
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(array, attribute.t.name))
        elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            given = np.array(attribute.f if attribute.name == "value_float" else attribute.floats, np.float32)
            array = narrow(given, kind)
            attribute.CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(array)))
        for graph in [attribute.g, *attribute.graphs]:
            for inner in graph.node:
                _retype(inner, kind)
