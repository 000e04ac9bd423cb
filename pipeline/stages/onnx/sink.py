"""Write a model's initializers piece by piece: into the .onnx when they are small together, else into one data file.

Every initializer is declared before the first byte is written, so that each place is known and the pieces may come in
any order: peak memory is a piece, not a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

EMBED_BYTES = 128 << 20
"""Up to this many bytes of initializers travel inside the .onnx: one file, and no reader minds hard links."""
_INLINE_BYTES = 4096
_ALIGNMENT = 4096
"""Of every tensor in the data file: a page, so that runtimes can map it."""


@dataclass
class _Place:
    proto: Any
    size: int
    offset: int = -1
    """In the data file; -1: inside the .onnx."""
    written: int = 0


class Sink:
    """Initializers on their way to disk. A context manager around `write`; then `move_into` gives them to the graph."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data_path = path.with_name(path.name + ".data")
        self._places: dict[str, _Place] = {}
        self._inline: dict[str, bytearray] = {}
        self._file: BinaryIO | None = None

    def declare(self, name: str, dims: tuple[int, ...], kind: int) -> int:
        """Announce an initializer of the TensorProto type `kind`. Returns its size in bytes."""
        import onnx

        if name in self._places:
            raise ValueError(f"initializer '{name}' is declared twice")
        itemsize = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).itemsize
        size: int = int(np.prod(dims, dtype=np.int64)) * itemsize
        if kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
            size = -(-size // 2)  # two to a byte; numpy's own type takes a byte for each
        self._places[name] = _Place(onnx.TensorProto(name=name, dims=dims, data_type=kind), size)
        return size

    @property
    def size(self) -> int:
        """Bytes of all initializers."""
        return sum(place.size for place in self._places.values())

    def __enter__(self) -> Sink:
        import onnx

        external = self.size > EMBED_BYTES
        end = 0
        for name, place in self._places.items():
            if not external or place.size < _INLINE_BYTES:
                self._inline[name] = bytearray(place.size)
                continue
            place.offset = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = place.offset + place.size
            place.proto.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", self.data_path.name), ("offset", place.offset), ("length", place.size)):
                place.proto.external_data.add(key=key, value=str(value))
        if external:
            self._file = self.data_path.open("wb")
            self._file.truncate(end)
        return self

    def write(self, name: str, values: npt.NDArray[Any], offset: int = 0) -> None:
        """Put an array's bytes (C order) at `offset` bytes into the initializer."""
        place = self._places[name]
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        if offset + flat.size > place.size:
            raise ValueError(f"initializer '{name}' has {place.size} bytes, {offset + flat.size} were written")
        place.written += flat.size
        if place.offset < 0:
            self._inline[name][offset : offset + flat.size] = flat.tobytes()
        else:
            assert self._file is not None
            self._file.seek(place.offset + offset)
            self._file.write(flat.data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if error is None:
            for name, place in self._places.items():
                if place.written != place.size:
                    raise ValueError(f"initializer '{name}': {place.written} of {place.size} bytes were written")

    def move_into(self, initializers: Any) -> None:
        """Append the finished TensorProtos to a graph's, in the order of declaration; the values are held once."""
        for name, place in self._places.items():
            initializers.append(place.proto)
            if name in self._inline:
                initializers[-1].raw_data = bytes(self._inline.pop(name))
