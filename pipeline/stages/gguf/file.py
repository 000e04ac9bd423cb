"""Write a GGUF file tensor by tensor, and read one's tensors without mapping it into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StageError
from pipeline.frozen import frozen
from pipeline.stages.gguf import native as gguf_native
from pipeline.stages.gguf.mix import Choice
from pipeline.stages.gguf.tensors import SLICE, Out
from pipeline.step import Progress

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ALIGNMENT = 32
_PLAIN = {"F32": "<f4", "F16": "<f2"}


@frozen
class Stored:
    """A tensor of a GGUF file. `shape` is as torch has it; `offset` and `size` are bytes in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def read(self, path: Path) -> bytes:
        """The tensor's bytes."""
        with path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def read_tensors(path: Path) -> dict[str, Stored]:
    """Name -> tensor, in the file's order."""
    import gguf

    return {
        each.name: Stored(
            each.name,
            each.tensor_type.name,
            tuple(int(n) for n in reversed(each.shape)),
            int(each.data_offset),
            int(each.n_bytes),
        )
        for each in gguf.GGUFReader(str(path)).tensors
    }


def write_tensors(
    writer: Any,
    outs: Sequence[Out],
    choices: Mapping[str, Choice],
    importance: Mapping[str, npt.NDArray[np.float32]],
    threads: int,
    progress: Progress,
) -> dict[str, int]:
    """Write the header and every tensor through `writer`, a gguf.GGUFWriter that has its keys. Type -> bytes.

    At most a few slices of SLICE bytes are in memory. Raises StageError for a value that a type cannot hold.
    """
    import gguf
    import numpy as np

    sizes: dict[str, int] = {}
    for out in outs:
        kind = gguf.GGMLQuantizationType[choices[out.name].type]
        block, each = gguf.GGML_QUANT_SIZES[kind]
        size = int(np.prod(out.shape, dtype=np.int64)) // block * each
        writer.add_tensor_info(out.name, out.shape, np.dtype(np.float32), size, raw_dtype=kind)
        sizes[out.name] = size
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    file.write(bytes(-file.tell() % ALIGNMENT))
    done, total = 0, sum(sizes.values())
    with ThreadPoolExecutor(threads) as pool:
        for out in outs:
            written = 0
            kind = choices[out.name].type
            for data in _encoded(out, kind, importance.get(out.name), pool, threads):
                file.write(data)
                written += len(data)
                progress(done + written, total, out.name)
            if written != sizes[out.name]:
                raise StageError(f"{out.name}: {written} bytes were written where {sizes[out.name]} belong")
            file.write(bytes(-written % ALIGNMENT))
            done += written
    found: dict[str, int] = {}
    for name, size in sizes.items():
        found[choices[name].type] = found.get(choices[name].type, 0) + size
    return found


def _encoded(
    out: Out, kind: str, importance: npt.NDArray[np.float32] | None, pool: ThreadPoolExecutor, threads: int
) -> Iterator[memoryview]:
    """The tensor's bytes in order; a slice is read while the ones before it are encoded."""
    waiting: list[Future[memoryview]] = []
    for _, rows in out.slices():
        for part in _pieces(rows, threads):
            waiting.append(pool.submit(encode, out.name, kind, part, importance))
            if len(waiting) > threads:
                yield waiting.pop(0).result()
    for each in waiting:
        yield each.result()


def _pieces(rows: npt.NDArray[np.float32], threads: int) -> Iterator[npt.NDArray[np.float32]]:
    """A slice in as many pieces as there are threads; a whole small tensor in one."""
    step = max(1, -(-len(rows) // threads)) if rows.nbytes > SLICE // 8 else max(1, len(rows))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def encode(
    name: str, kind: str, rows: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None
) -> memoryview:
    """Rows [n, columns] float32 as bytes of a ggml type."""
    import gguf
    import numpy as np

    if kind == "F32":
        return memoryview(np.ascontiguousarray(rows, "<f4").reshape(-1).view(np.uint8).data)
    if kind == "F16":
        with np.errstate(over="ignore"):
            half = rows.astype("<f2")
        if not np.isfinite(half).all():
            raise StageError(
                f"{name}: a value of {float(np.abs(rows).max()):.6g} does not fit F16 (65504 at most)",
                hint="ask for BF16 or F32",
            )
        return memoryview(half.reshape(-1).view(np.uint8).data)
    try:
        code = int(gguf.GGMLQuantizationType[kind])
        return memoryview(gguf_native.quantize(gguf_native.quantizer(), code, rows, importance).reshape(-1).data)
    except ValueError as error:
        raise StageError(f"{name}: {error}", hint="the weights may hold values beyond what the type can say") from error
