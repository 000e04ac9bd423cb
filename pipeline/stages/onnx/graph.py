"""Emit an ONNX graph node by node: names, constants, and weights that stay where the checkpoint has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import StageError
from pipeline.stages.checkpoint import Tensor

OPSET = 23  # RMSNormalization; ONNX Runtime has had CPU kernels of it since 1.23
IR_VERSION = 11
MICROSOFT = "com.microsoft"


class Graph:
    """A graph under construction. Every method that adds a node returns the name of its output."""

    def __init__(self, name: str, opset: int = OPSET) -> None:
        self.name, self.opset = name, opset
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}
        self._weights: dict[str, str] = {}

    def input(self, name: str, kind: str, shape: Sequence[int | str]) -> str:
        self.inputs.append(_value(name, kind, shape))
        return name

    def output(self, name: str, kind: str, shape: Sequence[int | str]) -> str:
        self.outputs.append(_value(name, kind, shape))
        return name

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        *,
        outputs: Sequence[str] = (),
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node; its outputs are `name`.out unless given. Returns the first output."""
        import onnx

        names = list(outputs) or [f"{name}.out"]
        self.nodes.append(onnx.helper.make_node(op, list(inputs), names, name=name, domain=domain, **attributes))
        return names[0]

    def constant(self, values: Any, kind: str = "int64") -> str:
        """A small constant inside the file; equal constants are one."""
        import onnx

        array = np.asarray(values, dtype=kind)
        key = (kind, array.tobytes(), array.shape)
        if key not in self._constants:
            self._constants[key] = f"constant.{len(self._constants)}"
            self.initializers.append(onnx.numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def table(self, name: str, values: npt.NDArray[Any]) -> str:
        """A computed initializer inside the file."""
        import onnx

        self.initializers.append(onnx.numpy_helper.from_array(values, name))
        return name

    def weight(self, tensor: Tensor) -> str:
        """A checkpoint's tensor as fp32: a reference into the safetensors file, with a Cast behind it when the stored
        type is another. The same tensor asked for twice is one initializer."""
        import onnx

        if tensor.name in self._weights:
            return self._weights[tensor.name]
        kinds = {
            "F32": onnx.TensorProto.FLOAT,
            "F16": onnx.TensorProto.FLOAT16,
            "BF16": onnx.TensorProto.BFLOAT16,
            "F64": onnx.TensorProto.DOUBLE,
        }
        if tensor.dtype not in kinds:
            raise StageError(
                f"{tensor.path.name}: tensor '{tensor.name}' has type {tensor.dtype}; fp32, fp16 or bf16 is needed",
                hint="start from the unquantized checkpoint",
            )
        proto = onnx.TensorProto(
            name=tensor.name, dims=tensor.shape, data_type=kinds[tensor.dtype], data_location=onnx.TensorProto.EXTERNAL
        )
        for key, value in (("location", tensor.path.name), ("offset", tensor.offset), ("length", tensor.length)):
            proto.external_data.add(key=key, value=str(value))
        self.initializers.append(proto)
        name = tensor.name
        if tensor.dtype != "F32":
            name = self.node("Cast", [name], f"{tensor.name}.fp32", to=onnx.TensorProto.FLOAT)
        self._weights[tensor.name] = name
        return name

    def model(self) -> Any:
        """The finished onnx.ModelProto."""
        import onnx

        graph = onnx.helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, self.initializers)
        opsets = [onnx.helper.make_opsetid("", self.opset)]
        if any(node.domain == MICROSOFT for node in self.nodes):
            opsets.append(onnx.helper.make_opsetid(MICROSOFT, 1))
        return onnx.helper.make_model(graph, producer_name="enginewright", ir_version=IR_VERSION, opset_imports=opsets)


def _value(name: str, kind: str, shape: Sequence[int | str]) -> Any:
    import onnx

    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)), list(shape))
