"""Tables of cosines and sines for rotary embeddings, as transformers computes them in fp32.

Legend: P positions, R half of the turning dimensions.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pipeline.stages.onnx.families import Rope

F32 = npt.NDArray[np.float32]


def rope_tables(rope: Rope, positions: int) -> tuple[F32, F32]:
    """(cos_PR, sin_PR) in fp32 for positions 0 to `positions` - 1, the attention factor of YaRN included."""
    inverse_R, factor = inverse_frequencies(rope)
    # The angle is rounded to fp32 as torch does; the functions themselves are taken in fp64.
    angle_PR = np.outer(np.arange(positions, dtype=np.float32), inverse_R).astype(np.float64)
    cos_PR = np.cos(angle_PR).astype(np.float32) * np.float32(factor)
    sin_PR = np.sin(angle_PR).astype(np.float32) * np.float32(factor)
    return cos_PR, sin_PR


def inverse_frequencies(rope: Rope) -> tuple[F32, float]:
    """(frequency of every pair of turning dimensions [R], what cosines and sines are multiplied with)."""
    given = dict(rope.scaling)
    exponent_R = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    power_R = np.power(rope.theta, exponent_R.astype(np.float64)).astype(np.float32)
    inverse_R = np.float32(1.0) / power_R
    if rope.kind == "linear":
        return inverse_R / np.float32(given["factor"]), 1.0
    if rope.kind == "llama3":
        return _llama3(inverse_R, given), 1.0
    if rope.kind == "yarn":
        return _yarn(power_R, rope, given)
    return inverse_R, 1.0


def _llama3(inverse_R: F32, given: dict[str, float]) -> F32:
    original, low, high = given["original_max_position_embeddings"], given["low_freq_factor"], given["high_freq_factor"]
    wavelength_R = 2 * math.pi / inverse_R
    slowed_R = np.where(wavelength_R > original / low, inverse_R / np.float32(given["factor"]), inverse_R)
    smooth_R = (original / wavelength_R - low) / (high - low)
    between_R = (1 - smooth_R) * slowed_R / np.float32(given["factor"]) + smooth_R * slowed_R
    medium_R = (wavelength_R >= original / high) & (wavelength_R <= original / low)
    return np.where(medium_R, between_R, slowed_R).astype(np.float32)


def _yarn(power_R: F32, rope: Rope, given: dict[str, float]) -> tuple[F32, float]:
    factor, dims = given["factor"], rope.dims

    def correction(turns: float) -> float:
        original = given["original_max_position_embeddings"]
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = correction(given.get("beta_fast") or 32), correction(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high = high + 0.001 if low == high else high
    ramp_R = np.clip((np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep_R = 1 - ramp_R
    inverse_R = 1 / (np.float32(factor) * power_R) * (1 - keep_R) + 1 / power_R * keep_R
    scale = given.get("attention_factor")
    if scale is None:
        both = given.get("mscale") and given.get("mscale_all_dim")
        scale = _mscale(factor, given["mscale"]) / _mscale(factor, given["mscale_all_dim"]) if both else _mscale(factor)
    return inverse_R.astype(np.float32), float(scale)


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
