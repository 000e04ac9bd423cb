"""Round weights to nearest as NNCF does, bit for bit, on slices that fit the cache.

w ~ (q - zero) * scale. Symmetric: the scale carries the sign of the value that is largest in magnitude, so that this
value becomes the one level that the range has more on its negative side. Weights are rounded by the scale in fp32; what
is stored is the scale in fp16.

Legend: N rows (outputs), K columns (inputs), B blocks in a row, G block size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
_EPSILON = np.finfo(np.float32).eps
"""A smaller scale is taken as this: a block of zeros needs none."""


class Rounded(NamedTuple):
    """Levels packed as the .bin has them (4 bits: two to a byte, the first in the low half), uint8 or int8."""

    levels: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    """[N, B, 1]"""
    zeros: npt.NDArray[np.uint8] | None
    """[N, B, 1], packed likewise; None when symmetric."""


def round_to_nearest(weight_NK: F32, bits: int, group: int, *, symmetric: bool) -> Rounded:
    """Quantize rows to 4 or 8 bits in blocks of `group` columns, of which K must be a multiple."""
    n, k = weight_NK.shape
    x_NBG = weight_NK.reshape(n, k // group, group)
    low, high = x_NBG.min(axis=-1, keepdims=True), x_NBG.max(axis=-1, keepdims=True)
    half, top = 1 << (bits - 1), (1 << bits) - 1
    if symmetric:
        scale = np.where(np.abs(low) >= high, np.abs(low), -high) / np.float32(half)
        scale = np.where(np.abs(scale) < _EPSILON, _EPSILON, scale)
        levels = np.clip(np.rint(x_NBG / scale), -half, half - 1).astype(np.int8).view(np.uint8)
        return Rounded(_packed(levels, bits), scale.astype(np.float16), None)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = (high - low) / np.float32(top)
    scale = np.where(scale < _EPSILON, _EPSILON, scale)
    zero = np.clip(-np.rint(low / scale), 0, top)
    steps = x_NBG / scale
    steps += zero
    np.rint(steps, out=steps)
    np.clip(steps, 0, top, out=steps)
    return Rounded(
        _packed(steps.astype(np.uint8), bits), scale.astype(np.float16), _packed(zero.astype(np.uint8), bits)
    )


def _packed(levels: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    flat = levels.reshape(-1)
    if bits == 8:
        return flat
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return np.asarray((flat[0::2] & 15) | (flat[1::2] << 4), dtype=np.uint8)
