"""Write a checkpoint shard by shard: a shard is whole on disk, under its final name, or not there at all.

Shard 1 holds the embeddings, then each layer has one, the last holds the norm and the head. So a stage that was killed
finds its finished layers again by their names.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import StageError
from pipeline.frozen import frozen
from pipeline.stages.checkpoint import Tensor as Stored
from pipeline.stages.checkpoint import read_header
from pipeline.stages.llm.scheme import SHORT_NAMES, TORCH_NAMES, Dtype

Tensor = Any
INDEX = "model.safetensors.index.json"
CODES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_CODES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "int64": "I64", "int32": "I32", "int8": "I8", "uint8": "U8",
}  # fmt: skip
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1}


@frozen
class Entry:
    """A tensor on its way into a shard."""

    name: str
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[bytes | memoryview]]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def ready(name: str, tensor: Tensor) -> Entry:
    """A tensor that is in memory."""
    import torch

    held = tensor.detach().cpu().contiguous()
    code = _CODES[str(held.dtype).removeprefix("torch.")]
    return Entry(name, code, tuple(held.shape), lambda: iter([held.reshape(-1).view(torch.uint8).numpy().data]))


def streamed(stored: Stored, dtype: Dtype) -> Entry:
    """A tensor of the source, converted slice by slice; bytes pass unchanged where the type is the same."""
    code = CODES[dtype]

    def chunks() -> Iterator[bytes | memoryview]:
        rows = stored.shape[0] if stored.shape else 1
        step = max(1, (4 << 20) * rows // max(1, stored.elements))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            if stored.dtype == code:
                yield stored.rows(start, stop, "native").tobytes()
            else:
                yield ready("", convert(stored, start, stop, dtype)).chunks().__next__()

    return Entry(stored.name, code, stored.shape, chunks)


def convert(stored: Stored, start: int, stop: int, dtype: Dtype) -> Tensor:
    """Rows of a stored tensor in another type. StageError where a value does not fit into it."""
    import torch

    converted = torch.from_numpy(stored.rows(start, stop)).to(getattr(torch, TORCH_NAMES[dtype]))
    if not bool(torch.isfinite(converted).all()):
        raise StageError(
            f"{stored.path.name}: a value of tensor '{stored.name}' does not fit into {dtype}",
            hint="choose `dtype: bf16`",
        )
    return converted


def write_shard(path: Path, entries: Sequence[Entry]) -> None:
    """One safetensors file: header, then the tensors in order without gaps; put in its place by a rename."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.size_bytes],
        }
        end += entry.size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    scratch = path.with_name(path.name + ".part")
    with scratch.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            written = sum(file.write(chunk) for chunk in entry.chunks())
            if written != entry.size_bytes:
                raise ValueError(f"tensor '{entry.name}': {written} of {entry.size_bytes} bytes were written")
        file.flush()
        os.fsync(file.fileno())
    scratch.chmod(0o644)
    scratch.replace(path)


def shard_name(number: int, count: int) -> str:
    """`model-00001-of-00006.safetensors`; numbers count from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path) -> None:
    """model.safetensors.index.json over the shards of a folder."""
    places: dict[str, str] = {}
    total = 0
    for shard in sorted(folder.glob("model-*.safetensors")):
        for name, tensor in read_header(shard).items():
            places[name] = shard.name
            total += tensor.length
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not there."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    scratch.replace(path)


def clear(folder: Path, keep: Callable[[str], bool]) -> None:
    """Make `folder`, or remove from it all that an earlier attempt did not finish."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if not keep(path.name):
            path.unlink()


def stored_dtype(config: Mapping[str, Any]) -> Dtype | None:
    """The type that a config.json says the weights have; None when it does not say, or an unusual one."""
    told = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return SHORT_NAMES.get(told)  # type: ignore[return-value]
