"""Read quantized linears back: names, shapes and bits in, float32 weights out, in numpy.

Shares no code and no constant with the packer: it was written from the formats' definitions, so that a mistake in one
is not repeated in the other.

Legend: N output channels, K inputs, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import VerificationError
from pipeline.stages.checkpoint import Tensor

Floats = npt.NDArray[np.float32]


def layout_of(config: Mapping[str, Any]) -> str:
    """The layout that a config.json announces, by its name in data/llm_servers.toml; VerificationError for no known."""
    told = config.get("quantization_config")
    if not told:
        return "plain"
    method = told.get("quant_method")
    if method == "fp8":
        return "fp8-block"
    if method in ("awq", "gptq"):
        return str(method)
    form = told.get("format")
    layouts = {"pack-quantized": "w4a16", "int-quantized": "w8a8", "float-quantized": "fp8"}
    if method != "compressed-tensors" or form not in layouts:
        raise VerificationError(f"config.json: quantization {method!r}, format {form!r} is not known here")
    return layouts[form]


def weight(tensors: Mapping[str, Tensor], name: str, layout: str) -> Floats:
    """The float32 weight [N, K] of the linear `name`. Raises KeyError for a missing tensor."""
    return scaled(codes(tensors, name, layout), *grid(tensors, name, layout))


def codes(tensors: Mapping[str, Tensor], name: str, layout: str) -> npt.NDArray[Any]:
    """What is stored for each weight, [N, K]: 0 to 15 for 4 bits, -128 to 127, or the float32 value of an e4m3."""
    if layout == "w4a16":
        return _nibbles(tensors[f"{name}.weight_packed"].numpy("native"))
    if layout == "awq":
        return np.ascontiguousarray(_awq(tensors[f"{name}.qweight"].numpy("native")).T)
    if layout == "gptq":
        return _nibbles(np.ascontiguousarray(tensors[f"{name}.qweight"].numpy("native").T))
    stored = tensors[f"{name}.weight"]
    raw = stored.numpy("native")
    return raw if stored.dtype == "I8" else _E4M3[raw]


def grid(tensors: Mapping[str, Tensor], name: str, layout: str) -> tuple[Floats, npt.NDArray[Any] | None]:
    """(scale, zero): [N, G] and [N, G] or None for 8 bits, whose scale is [N, 1] or one a block."""
    if layout == "w4a16":
        scale = tensors[f"{name}.weight_scale"].numpy()
        if f"{name}.weight_zero_point" not in tensors:
            return scale, np.full(scale.shape, 8, np.uint8)
        packed = tensors[f"{name}.weight_zero_point"].numpy("native")
        return scale, np.ascontiguousarray(_nibbles(np.ascontiguousarray(packed.T)).T)
    if layout == "awq":
        zeros = _awq(tensors[f"{name}.qzeros"].numpy("native"))
        return tensors[f"{name}.scales"].numpy().T, zeros.T
    if layout == "gptq":
        zeros = _nibbles(tensors[f"{name}.qzeros"].numpy("native")) + np.uint8(1)
        return tensors[f"{name}.scales"].numpy().T, zeros.T
    suffix = "weight_scale_inv" if layout == "fp8-block" else "weight_scale"
    return tensors[f"{name}.{suffix}"].numpy(), None


def scaled(stored: npt.NDArray[Any], scale: Floats, zero: npt.NDArray[Any] | None) -> Floats:
    """Codes, scales and zero points -> weights [N, K]."""
    rows, columns = stored.shape
    repeat = (rows // scale.shape[0], columns // scale.shape[1])
    if repeat[0] * scale.shape[0] != rows or repeat[1] * scale.shape[1] != columns:
        raise VerificationError(f"scales {scale.shape} do not divide weights {stored.shape}")
    values = stored.astype(np.float32)
    if zero is not None:
        values -= np.repeat(zero.astype(np.float32), repeat[1], axis=1)
    values *= np.repeat(np.repeat(scale, repeat[0], axis=0), repeat[1], axis=1)
    return values


def _nibbles(packed: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """[R, C] int32 -> [R, 8 C], the lowest four bits first."""
    # Little-endian bytes: each holds two values, the first in its low half.
    two = np.ascontiguousarray(packed).view(np.uint8)
    out = np.empty((packed.shape[0], two.shape[1] * 2), np.uint8)
    out[:, 0::2], out[:, 1::2] = two & 15, two >> 4
    return out


def _awq(packed: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """[R, C] int32 -> [R, 8 C]: even columns in the low half of the word, odd ones in its high half."""
    words = np.ascontiguousarray(packed).view(np.uint32)
    out = np.empty((packed.shape[0], packed.shape[1], 8), np.uint8)
    for pair in range(4):
        out[:, :, 2 * pair] = (words >> np.uint32(4 * pair)) & np.uint32(15)
        out[:, :, 2 * pair + 1] = (words >> np.uint32(16 + 4 * pair)) & np.uint32(15)
    return out.reshape(packed.shape[0], -1)


def _e4m3() -> Floats:
    """The value of every byte as sign, 4 exponent bits (bias 7), 3 mantissa bits; 0x7f and 0xff are NaN."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    size = np.where(exponent > 0, 2.0 ** (exponent - 7) * (1 + mantissa / 8), 2.0**-6 * mantissa / 8)
    size[(byte & 127) == 127] = np.nan
    return np.where(byte & 128, -size, size).astype(np.float32)


_E4M3 = _e4m3()
