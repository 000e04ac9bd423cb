"""Find where an initializer's bytes are: beside the graph, in the model folder, or in the graph's own file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.errors import StageError
from pipeline.frozen import frozen
from pipeline.stages.checkpoint import Tensor

FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16
_TYPES = {
    1: "F32",
    2: "U8",
    3: "I8",
    4: "U16",
    5: "I16",
    6: "I32",
    7: "I64",
    9: "BOOL",
    10: "F16",
    11: "F64",
    16: "BF16",
}
"""TensorProto data type -> safetensors type."""


@frozen
class Held(Tensor):
    """A tensor whose values are in memory, inside the graph's file."""

    array: Any = None

    def _read(self, start: int, stop: int) -> Any:
        return self.array.reshape(self.shape or (1,))[start:stop]


@frozen
class Stacked(Tensor):
    """Tensors of one type one above the other, along the first axis."""

    parts: tuple[Tensor, ...] = ()

    def rows(self, start: int, stop: int, dtype: Literal["float32", "native"] = "float32") -> Any:
        found, above = [], 0
        for part in self.parts:
            first, last = max(start - above, 0), min(stop - above, part.shape[0])
            if first < last:
                found.append(part.rows(first, last, dtype))
            above += part.shape[0]
        return found[0] if len(found) == 1 else np.concatenate(found)


def find_source(tensor: Any, graph: Path, folders: Sequence[Path]) -> Tensor:
    """The bytes of a TensorProto of the file `graph`; external data are looked for in `folders`, in order."""
    name, kind = tensor.name, _TYPES.get(tensor.data_type)
    if kind is None:
        raise StageError(f"{graph.name}: initializer '{name}' has the unknown data type {tensor.data_type}")
    if tensor.data_location != tensor.EXTERNAL:
        return _held(tensor, kind, graph)
    info = {entry.key: entry.value for entry in tensor.external_data}
    location = info["location"]
    if Path(location).name != location:
        raise StageError(f"{graph.name}: initializer '{name}' lies in '{location}', outside of the export")
    path = next((folder / location for folder in folders if (folder / location).exists()), None)
    if path is None:
        raise StageError(
            f"{graph.name}: initializer '{name}' lies in {location}, which is not there",
            hint="the model folder changed since the export: build again",
        )
    size, offset = path.stat().st_size, int(info.get("offset", 0))
    length = int(info.get("length", size - offset))
    if offset + length > size:
        raise StageError(
            f"{location} ends before initializer '{name}' does", hint="the model folder changed: build again"
        )
    return Tensor(name, kind, tuple(tensor.dims), path, offset, length)


def _held(tensor: Any, kind: str, graph: Path) -> Held:
    import onnx

    array = onnx.numpy_helper.to_array(tensor)
    if kind == "BF16":
        array = array.view(np.uint16)
    return Held(tensor.name, kind, tuple(tensor.dims), graph, 0, array.nbytes, array)
