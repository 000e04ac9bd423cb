"""Add a sentence-transformers folder's pooling to the graph of an encoder that has none.

Legend: B batch, T tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any

from pipeline.parity.pooling import Pooling


def add_pooling(model: Any, pooling: Pooling) -> None:
    """Give `model` (onnx_ir.Model, opset 18 or later) the output sentence_embedding [B, H], from its output
    last_hidden_state [B, T, H] and its input attention_mask [B, T]."""
    import numpy as np
    import onnx_ir

    graph = model.graph
    tokens_BTH = next(value for value in graph.outputs if value.name == "last_hidden_state")
    mask_BT = next(value for value in graph.inputs if value.name == "attention_mask")

    def constant(name: str, value: Any) -> Any:
        tensor = onnx_ir.tensor(np.asarray(value), name=f"pooling.{name}")
        found = onnx_ir.Value(name=tensor.name, type=onnx_ir.TensorType(tensor.dtype), shape=tensor.shape)
        found.const_value = tensor
        graph.register_initializer(found)
        return found

    def add(op: str, *inputs: Any, name: str = "", **attributes: Any) -> Any:
        name = name or f"pooling.{len(graph)}"
        node = onnx_ir.node(op, list(inputs), attributes, name=f"pooling.{op}.{len(graph)}")
        graph.append(node)
        node.outputs[0].name = name
        return node.outputs[0]

    last = "sentence_embedding"
    if pooling.mode == "cls":
        first = constant("first", np.int64(0))
        vector_BH = add("Gather", tokens_BTH, first, axis=1, name="" if pooling.normalize else last)
    else:
        over_tokens, ones = constant("tokens", np.array([1], np.int64)), constant("width", np.array([2], np.int64))
        weights_BT1 = add("Unsqueeze", add("Cast", mask_BT, to=onnx_ir.DataType.FLOAT.value), ones)
        total_BH = add("ReduceSum", add("Mul", tokens_BTH, weights_BT1), over_tokens, keepdims=0)
        count_B1 = add("ReduceSum", weights_BT1, over_tokens, keepdims=0)
        count_B1 = add("Max", count_B1, constant("least", np.float32(1e-9)))
        vector_BH = add("Div", total_BH, count_B1, name="" if pooling.normalize else last)
    if pooling.normalize:
        length_B1 = add("ReduceL2", vector_BH, constant("features", np.array([1], np.int64)), keepdims=1)
        length_B1 = add("Max", length_B1, constant("shortest", np.float32(1e-12)))
        vector_BH = add("Div", vector_BH, length_B1, name=last)
    vector_BH.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    vector_BH.shape = onnx_ir.Shape([mask_BT.shape[0], tokens_BTH.shape[2]])
    graph.outputs.append(vector_BH)
