"""Read safetensors checkpoints lazily, without torch: headers first, tensors by row slices.

A Hugging Face folder holds `model.safetensors`, or shards that `model.safetensors.index.json` names. Nothing here maps
a file into memory: a slice is read, used and dropped, so peak memory is the slice, whatever the checkpoint's size.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.errors import RecipeError, StageError
from pipeline.frozen import frozen

FLOATS = ("F64", "F32", "F16", "BF16")
_NUMPY: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # bits: numpy has no bfloat16
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
}
_HEADER_LIMIT = 100_000_000
_SLICE_BYTES = 16 << 20
_CONVERT = (
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}-safetensors')\""
)


@frozen
class Tensor:
    """One tensor of a checkpoint: where its bytes are. `offset` and `length` are in bytes, from the file's start."""

    name: str
    dtype: str
    """As safetensors names it: F32, F16, BF16, I64, ..."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    length: int

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def numpy(self, dtype: Literal["float32", "native"] = "float32") -> npt.NDArray[Any]:
        """The whole tensor. `native` keeps the stored type; bfloat16 comes as its uint16 bits. See `rows`."""
        rows = self.shape[0] if self.shape else 1
        return self.rows(0, rows, dtype).reshape(self.shape)

    def rows(self, start: int, stop: int, dtype: Literal["float32", "native"] = "float32") -> npt.NDArray[Any]:
        """Rows `start:stop` of the first axis as an array of its own, C order.

        Floats are checked as they pass: a NaN or an infinity raises StageError that names the tensor.
        """
        raw = self._read(start, stop)
        if self.dtype not in FLOATS:
            if dtype == "float32":
                raise StageError(
                    f"{self.path.name}: tensor '{self.name}' has type {self.dtype}, not a floating-point type",
                    hint="quantized checkpoints are not re-quantized: start from the fp32, fp16 or bf16 weights",
                )
            return raw
        values = as_float32(raw, self.dtype)
        _refuse_not_finite(values, self, start)
        return values if dtype == "float32" else raw

    def slices(self, size_bytes: int = _SLICE_BYTES) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """(first row, float32 rows) from the start to the end, each slice of about `size_bytes` as float32."""
        rows = self.shape[0] if self.shape else 1
        step = max(1, size_bytes * rows // max(1, 4 * self.elements))
        for start in range(0, rows, step):
            yield start, self.rows(start, min(rows, start + step))

    def _read(self, start: int, stop: int) -> npt.NDArray[Any]:
        kind = np.dtype(_NUMPY[self.dtype])
        inner = self.shape[1:]
        each = int(np.prod(inner, dtype=np.int64))
        with self.path.open("rb") as file:
            file.seek(self.offset + start * each * kind.itemsize)
            flat = np.fromfile(file, dtype=kind, count=(stop - start) * each)
        if flat.size != (stop - start) * each:
            raise _truncated(self.path, f"tensor '{self.name}' is cut off")
        return flat.reshape((stop - start, *inner))


def as_float32(raw: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Stored values as float32; bfloat16 bits are widened exactly."""
    if dtype == "BF16":
        wide = raw.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return raw.astype(np.float32, copy=False)


def _refuse_not_finite(values: npt.NDArray[np.float32], tensor: Tensor, start: int) -> None:
    # min and max carry a NaN through and need no temporary of the tensor's size.
    if values.size == 0 or (np.isfinite(values.min()) and np.isfinite(values.max())):
        return
    first = np.argwhere(~np.isfinite(values))[0]
    place = [int(first[0]) + start, *map(int, first[1:])] if tensor.shape else []
    raise StageError(
        f"{tensor.path.name}: tensor '{tensor.name}' holds {values[tuple(first)]} at {place}",
        hint="the checkpoint is damaged or training diverged; download it again or use an earlier one",
    )


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a model folder by name, in the order of their files and offsets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, Tensor] = {}
        for path, names in _files(folder).items():
            found = read_header(path)
            for name in names or ():
                if name not in found:
                    raise StageError(
                        f"{path.name} lacks tensor '{name}', which model.safetensors.index.json says it holds",
                        hint="the shards and the index are of different uploads: download the model again",
                    )
            for name, tensor in found.items():
                if name in self._tensors:
                    raise StageError(
                        f"tensor '{name}' is both in {self._tensors[name].path.name} and in {path.name}",
                        hint="remove the safetensors files that do not belong to the model",
                    )
                self._tensors[name] = tensor

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return read_json(self.folder / "config.json")

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def take(self, name: str, shape: tuple[int, ...] | None = None, because: str = "") -> Tensor:
        """The tensor, which must exist and have `shape`; `because` says which config fields ask for that shape."""
        if name not in self._tensors:
            close = sorted(key for key in self if key.rsplit(".", 2)[-2:] == name.rsplit(".", 2)[-2:])[:1]
            raise StageError(
                f"the checkpoint in '{self.folder.name}' has no tensor '{name}'",
                hint=f"it has '{close[0]}'; does config.json describe these weights?"
                if close
                else "config.json asks for it: does it describe these weights? Is a shard missing?",
            )
        tensor = self._tensors[name]
        if shape is not None and tensor.shape != shape:
            raise StageError(
                f"{tensor.path.name}: tensor '{name}' has shape {list(tensor.shape)}, but config.json asks for "
                f"{list(shape)}" + (f" ({because})" if because else ""),
                hint="config.json and the weights are not of the same model",
            )
        return tensor


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder. StageError when it is missing or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(
            f"the model folder '{path.parent.name}' has no {path.name}", hint="download the whole model folder"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StageError(f"{path.name} is not JSON: {error}", hint="download the file again") from error
    if not isinstance(value, dict):
        raise StageError(f"{path.name} is not a JSON object", hint="download the file again")
    return value


def read_header(path: Path) -> dict[str, Tensor]:
    """Name -> Tensor of one safetensors file, in offset order. Reads the header only, checks it against the size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise _truncated(path, f"{size} bytes are no safetensors file")
        (length,) = struct.unpack("<Q", start)
        if length > _HEADER_LIMIT or 8 + length > size:
            raise _truncated(path, f"its header says {length} bytes, the file has {size}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = [
                (*item["data_offsets"], name, item["dtype"], tuple(item["shape"])) for name, item in header.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StageError(
                f"{path.name} has no readable safetensors header ({error})", hint="download the file again"
            ) from error
    tensors: dict[str, Tensor] = {}
    for begin, end, name, dtype, shape in sorted(entries):
        if 8 + length + end > size:
            raise _truncated(path, f"tensor '{name}' ends at byte {8 + length + end}, the file has {size}")
        tensor = Tensor(name, dtype, shape, path, 8 + length + begin, end - begin)
        if dtype in _NUMPY and tensor.elements * np.dtype(_NUMPY[dtype]).itemsize != tensor.length:
            raise StageError(
                f"{path.name}: tensor '{name}' of shape {list(shape)} and type {dtype} cannot have {end - begin} bytes",
                hint="the file is damaged: download it again",
            )
        tensors[name] = tensor
    return tensors


def _truncated(path: Path, why: str) -> StageError:
    return StageError(f"{path.name} is truncated: {why}", hint="the download did not finish: download it again")


def _files(folder: Path) -> dict[Path, tuple[str, ...] | None]:
    """Safetensors file -> the tensors that the index says it holds (None without an index)."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise StageError(f"{index.name} has no weight_map", hint="download the file again")
        names: dict[Path, tuple[str, ...] | None] = {}
        for tensor, file in sorted(weight_map.items()):
            if not isinstance(file, str) or Path(file).name != file:
                raise StageError(f"{index.name} names '{file}', which is not a file of the model folder")
            path = folder / file
            if not path.exists():
                raise StageError(
                    f"{index.name} names {file} (for tensor '{tensor}'), which is not there",
                    hint="the download did not finish: download the missing shard",
                )
            names[path] = (*(names.get(path) or ()), tensor)
        return names
    if single.exists():
        return {single: None}
    pickles = sorted(path.name for suffix in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{suffix}"))
    if pickles:
        raise RecipeError(
            f"the model folder '{folder.name}' has its weights only as {pickles[0]}, a pickle, which can run code "
            "when it is read",
            hint=f"if you trust its origin, convert it once: {_CONVERT.format(folder=folder.name)}",
        )
    raise RecipeError(
        f"the model folder '{folder.name}' has neither model.safetensors nor model.safetensors.index.json",
        hint="download the model's safetensors files",
    )
