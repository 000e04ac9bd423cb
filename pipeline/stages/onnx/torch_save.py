"""Write an onnx_ir model to disk, tensor by tensor: in one file, or beside one external data file when it is large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EMBED_LIMIT_BYTES = 1 << 20
"""Up to here the weights stay in the .onnx. What reads an export takes larger ones out of the data file one by one."""

_ALIGNMENT = 4096  # a runtime can map the tensors of the data file into memory


def save_model(model: Any, path: Path) -> None:
    """Write `path`, and `path`.data when the initializers are larger than EMBED_LIMIT_BYTES.

    Equal models give equal bytes; the peak is one tensor above the model's own memory.
    """
    initializers = list(model.graph.initializers.values())
    total = sum(value.const_value.nbytes for value in initializers)
    if total > EMBED_LIMIT_BYTES:
        _save_external(model, path)
    else:
        _save_embedded(model, path)


def _save_external(model: Any, path: Path) -> None:
    import onnx_ir

    offset = 0
    data = path.with_name(f"{path.name}.data")
    with data.open("wb") as file:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor.nbytes < 1024:  # shape arguments and scalars: shape inference has to see them
                continue
            file.write(b"\0" * (-offset % _ALIGNMENT))
            offset += -offset % _ALIGNMENT
            file.write(_raw(tensor))
            value.const_value = onnx_ir.ExternalTensor(
                data.name, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name,
                base_dir=str(path.parent),
            )  # fmt: skip
            offset += tensor.nbytes
    path.write_bytes(onnx_ir.to_proto(model).SerializeToString(deterministic=True))


def _save_embedded(model: Any, path: Path) -> None:
    """Write the protobuf by hand around the weights: the library would hold the model three times.

    ModelProto.graph is field 7, GraphProto.initializer is field 5, TensorProto.raw_data is field 9; the order of
    fields inside a message is free.
    """
    import onnx
    import onnx_ir

    tensors = dict(model.graph.initializers)
    heads: list[tuple[bytes, Any]] = []
    size = 0
    for name, value in tensors.items():
        tensor = value.const_value
        head = onnx.TensorProto(name=name, dims=tensor.shape.numpy(), data_type=int(tensor.dtype)).SerializeToString()
        head += _tag(9) + _varint(tensor.nbytes)
        head = _tag(5) + _varint(len(head) + tensor.nbytes) + head
        heads.append((head, tensor))
        size += len(head) + tensor.nbytes
    model.graph.initializers.clear()
    proto = onnx_ir.to_proto(model)
    model.graph.initializers.update(tensors)
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    with path.open("wb") as file:
        file.write(proto.SerializeToString(deterministic=True))
        file.write(_tag(7) + _varint(len(graph) + size) + graph)
        for head, tensor in heads:
            file.write(head)
            file.write(_raw(tensor))


def _raw(tensor: Any) -> Any:
    """The tensor's bytes as ONNX stores them, without a copy where it is an array in C order already."""
    import numpy as np
    import onnx_ir

    if tensor.dtype.bitwidth < 8 or tensor.dtype == onnx_ir.DataType.STRING:
        return tensor.tobytes()
    return np.ascontiguousarray(tensor.numpy()).view(np.uint8).reshape(-1).data


def _tag(field: int) -> bytes:
    return bytes([field << 3 | 2])  # wire type 2: a length and that many bytes


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
