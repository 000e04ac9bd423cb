"""Quantize weights block by block into the layout of com.microsoft MatMulNBits.

Every row's K values are cut into blocks of G, each with its own scale (and zero point): w ~ (q - zero) * scale, q of 4
or 8 bits unsigned. Without zero points the zero is half the range. 4-bit values lie two to a byte, the first in the low
half. numpy on slices that fit the cache is faster than ONNX Runtime's own kernel, which wants the weight transposed,
and gives the same scales (tests compare them).

Legend: N rows (outputs), K columns (inputs), B blocks in a row, G block size.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Algorithm = Literal["rtn", "k_quant"]

_STEPS = 9
"""k_quant: how many scales are tried on either side of round-to-nearest's."""


class Quantized(NamedTuple):
    """q_NBX packed (X = G * bits / 8), scales_NB, and zeros packed [N, ceil(B * bits / 8)] or None when symmetric."""

    packed: U8
    scales: F32
    zeros: U8 | None


def shapes(n: int, k: int, bits: int, group: int) -> tuple[tuple[int, int, int], tuple[int, int], tuple[int, int]]:
    """Shapes of `Quantized`'s three arrays for a weight [n, k]."""
    blocks = -(-k // group)
    return (n, blocks, group * bits // 8), (n, blocks), (n, -(-blocks * bits // 8))


def quantize(weight_NK: F32, bits: int, group: int, *, symmetric: bool, algorithm: Algorithm = "rtn") -> Quantized:
    """Quantize rows. K is padded with zeros to a multiple of `group`, as MatMulNBits expects."""
    n, k = weight_NK.shape
    blocks = -(-k // group)
    if blocks * group != k:
        weight_NK = np.pad(weight_NK, ((0, 0), (0, blocks * group - k)))
    x = weight_NK.reshape(n, blocks, group)
    if symmetric:
        scales = _symmetric_scales(x, bits)
        if algorithm == "k_quant":
            scales = _search_symmetric(x, scales, bits)
        zeros: F32 | None = None
        q = _round(x, scales, np.float32(1 << (bits - 1)), bits)
    else:
        scales, zeros = _asymmetric_scales(x, bits)
        if algorithm == "k_quant":
            scales, zeros = _search_asymmetric(x, scales, zeros, bits)
        q = _round(x, scales, zeros[..., None], bits)
    return Quantized(_pack(q, bits), scales, None if zeros is None else _pack(zeros, bits))


def dequantize(quantized: Quantized, bits: int, group: int, k: int) -> F32:
    """The weight [N, k] that the kernel multiplies with."""
    n, blocks = quantized.scales.shape
    q = _unpack(quantized.packed, bits).reshape(n, blocks, group).astype(np.float32)
    if quantized.zeros is None:
        q -= np.float32(1 << (bits - 1))
    else:
        q -= _unpack(quantized.zeros, bits)[:, :blocks, None].astype(np.float32)
    return np.asarray((q * quantized.scales[..., None]).reshape(n, blocks * group)[:, :k], dtype=np.float32)


def _pack(values: npt.NDArray[np.float32], bits: int) -> U8:
    q = values.astype(np.uint8)
    if bits == 8:
        return q
    if q.shape[-1] % 2:
        q = np.concatenate([q, np.zeros((*q.shape[:-1], 1), np.uint8)], axis=-1)
    return np.asarray(q[..., 0::2] | (q[..., 1::2] << 4), dtype=np.uint8)


def _unpack(packed: U8, bits: int) -> U8:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _inverse(scales: F32) -> F32:
    """1 / scale; 0 for a block of zeros."""
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)


def _round(x: F32, scales: F32, zeros: F32 | np.float32, bits: int) -> F32:
    """Unsigned integers, still as floats."""
    q = x * _inverse(scales)[..., None]
    q += zeros
    np.rint(q, out=q)
    return np.clip(q, 0, (1 << bits) - 1, out=q)


def _symmetric_scales(x: F32, bits: int) -> F32:
    # The value of the largest magnitude gets the code 0, the one code that has no mirror image; so scales are signed.
    high, low = x.max(-1), x.min(-1)
    return np.asarray(np.where(high > -low, high, low) / np.float32(-(1 << (bits - 1))), dtype=np.float32)


def _asymmetric_scales(x: F32, bits: int) -> tuple[F32, F32]:
    high, low = np.maximum(x.max(-1), 0), np.minimum(x.min(-1), 0)
    scales = (high - low) / np.float32((1 << bits) - 1)
    zeros = np.clip(np.rint(-low * _inverse(scales)), 0, (1 << bits) - 1)
    return scales.astype(np.float32), zeros.astype(np.float32)


def _search_symmetric(x: F32, scales: F32, bits: int) -> F32:
    """Try scales around round-to-nearest's, refit each by least squares weighted with x squared, keep the best.

    Maximising (sum w x q)^2 / sum w q^2 minimises the weighted error of the refitted scale.
    """
    half = 1 << (bits - 1)
    weight = x * x
    best, found = np.full(scales.shape, -1, np.float32), scales.copy()
    for step in range(-_STEPS, _STEPS + 1):
        # Below 8 bits a tenth of a code is a useful step; the range clips by up to one code or leaves one unused.
        trial = scales * np.float32(half / (half + 0.1 * step))
        q = _round(x, trial, np.float32(half), bits)
        q -= np.float32(half)
        wq = weight * q
        along, square = np.einsum("nbg,nbg->nb", wq, x), np.einsum("nbg,nbg->nb", wq, q)
        gain = np.divide(along * along, square, out=np.zeros_like(along), where=square > 0)
        better = gain > best
        best = np.where(better, gain, best)
        fitted = np.divide(along, square, out=np.zeros_like(along), where=square > 0)
        found = np.where(better, fitted, found)
    return np.asarray(found, dtype=np.float32)


def _search_asymmetric(x: F32, scales: F32, zeros: F32, bits: int) -> tuple[F32, F32]:
    """The same with a zero point, which is rounded to an integer before the error is taken."""
    full = (1 << bits) - 1
    weight = x * x
    low = np.minimum(x.min(-1), 0)
    best: F32 | None = None
    found, found_zeros = scales, zeros
    for step in range(-_STEPS, _STEPS + 1):
        trial = scales * np.float32(full / (full + 0.1 * step))
        shift = np.clip(np.rint(-low * _inverse(trial)), 0, full)
        q = _round(x, trial, shift[..., None], bits)
        q -= shift[..., None]
        wq = weight * q
        along, square = np.einsum("nbg,nbg->nb", wq, x), np.einsum("nbg,nbg->nb", wq, q)
        fitted = np.divide(along, square, out=np.zeros_like(along), where=square > 0)
        # The constant part, sum w x^2, is the same for all trials.
        error = fitted * fitted * square - 2 * fitted * along
        better = np.ones(error.shape, bool) if best is None else error < best
        best = error if best is None else np.where(better, error, best)
        found, found_zeros = np.where(better, fitted, found), np.where(better, shift, found_zeros)
    return found.astype(np.float32), found_zeros.astype(np.float32)
