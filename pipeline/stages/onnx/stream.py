"""Move a weight from its source to its place in slices: as it is, as another float type, or quantized."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.errors import UnavailableError
from pipeline.stages.checkpoint import Tensor
from pipeline.stages.onnx.half import LARGEST, half, narrow
from pipeline.stages.onnx.nbits import F32, Algorithm, quantize, shapes
from pipeline.stages.onnx.sink import Sink
from pipeline.stages.onnx.sources import BFLOAT16, FLOAT, FLOAT16

_SLICE_BYTES = 1 << 20
"""Quantization works on slices of this size, so that its passes stay in the cache."""
_COPY_BYTES = 16 << 20


def stream(sink: Sink, source: Tensor, kind: int) -> None:
    """Copy a tensor as the TensorProto type `kind`; floats are checked as they pass."""
    offset, rows = 0, source.shape[0] if source.shape else 1
    step = max(1, _COPY_BYTES * rows // max(1, source.length))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if kind == FLOAT:
            values = source.rows(start, stop)
        elif kind == FLOAT16 and source.dtype != "F16":
            values = _halved(source, source.rows(start, stop))
        elif kind == BFLOAT16 and source.dtype != "BF16":
            values = narrow(source.rows(start, stop), BFLOAT16)
        else:
            values = source.rows(start, stop, "native")
        sink.write(source.name, values, offset)
        offset += values.nbytes


def _halved(source: Tensor, values: F32) -> npt.NDArray[np.float16]:
    # A single number is a mask's "minus infinity"; anything larger is a weight.
    if source.elements > 1 and max(values.max(), -values.min()) > LARGEST:
        raise UnavailableError(
            f"{source.path.name}: tensor '{source.name}' has values beyond fp16's range (65504)",
            hint="use precision fp32, int8 or int4",
        )
    return np.asarray(half(values), dtype=np.float16)


Settings = tuple[int, int, bool, Algorithm, bool]
"""bits, group, symmetric, algorithm, whether scales are fp16"""


def quantize_rows(sink: Sink, names: list[str], source: Tensor, settings: Settings) -> None:
    """A weight stored [N, K]: slice after slice of rows goes straight to its place."""
    bits, group, symmetric, algorithm, halved = settings
    offsets = [0] * len(names)
    for _, weight_NK in source.slices(_SLICE_BYTES):
        parts = quantize(weight_NK, bits, group, symmetric=symmetric, algorithm=algorithm)
        for index, part in enumerate(part for part in parts if part is not None):
            values = half(part) if halved and index == 1 else part
            sink.write(names[index], values, offsets[index])
            offsets[index] += values.nbytes


def quantize_columns(sink: Sink, names: list[str], source: Tensor, settings: Settings) -> None:
    """A weight stored [K, N]: slices of K hold every row's next blocks, so the packed whole is put together first."""
    bits, group, symmetric, algorithm, halved = settings
    k, n = source.shape
    whole = [
        np.zeros(shape, np.float32 if index == 1 else np.uint8) for index, shape in enumerate(shapes(n, k, bits, group))
    ]
    step = 2 * group * max(1, _COPY_BYTES // (8 * n * group))  # two blocks: 4-bit zero points come in pairs
    for start in range(0, k, step):
        weight_KN = source.rows(start, min(k, start + step))
        rows = max(1, _SLICE_BYTES // (4 * weight_KN.shape[0]))
        for first in range(0, n, rows):
            weight_NK = np.ascontiguousarray(weight_KN[:, first : first + rows].T)
            parts = quantize(weight_NK, bits, group, symmetric=symmetric, algorithm=algorithm)
            for target, part, each in zip(whole, parts, (1, 1, bits / 8), strict=True):
                if part is not None:
                    block = int(start // group * each)
                    target[first : first + rows, block : block + part.shape[1]] = part
    for index, (name, values) in enumerate(zip(names, whole, strict=False)):
        sink.write(name, half(values) if halved and index == 1 else values)
