"""Rounding weights to a grid: scales, zero points and codes, in torch.

Scales are rounded to the type in which they are stored before a weight is divided by them, so that the codes are the
nearest of what a reader will compute. Codes of 4 bits are unsigned here: value = (code - zero) * scale; a symmetric
grid has zero 8.

Legend: N output channels, K inputs, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.errors import StageError
from pipeline.frozen import frozen
from pipeline.stages.llm.scheme import BLOCK, TORCH_NAMES, Scheme

Tensor = Any
CHUNK = 1 << 22
"""Weights that are worked on at a time."""
SHRINKS = tuple(1 - 0.03 * step for step in range(14))
"""Candidates for a group's scale, as shares of the one that clips nothing."""


@frozen
class Rounded:
    """A weight on its grid."""

    codes: Tensor
    """[N, K]: uint8 (4 bits), int8, or float8_e4m3fn."""
    scale: Tensor
    """[N, G], [N, 1], or [N / 128, K / 128]; stored type."""
    zero: Tensor | None = None
    """[N, G] uint8, 4 bits only."""


def round_weight(weight_NK: Tensor, scheme: Scheme, importance_K: Tensor | None = None) -> Rounded:
    """A float32 weight rounded to nearest. `importance_K` (mean square of each input, or ones) makes int4 search its
    scales; without it a group's largest weight decides."""
    import torch

    dtype = getattr(torch, TORCH_NAMES[scheme.dtype])
    if scheme.bits == 4:
        scale_NG, zero_NG = group_scales(weight_NK, scheme, importance_K)
        codes_NK = torch.empty(weight_NK.shape, dtype=torch.uint8, device=weight_NK.device)
        for rows in _rows(weight_NK):
            codes_NK[rows] = encode(weight_NK[rows], scale_NG[rows], zero_NG[rows], scheme.group_size)
        return Rounded(codes_NK, scale_NG, zero_NG)
    if scheme.layout == "w8a8":
        scale_N1 = _stored(weight_NK.abs().amax(1, keepdim=True) / 127, dtype)
        return Rounded((weight_NK / scale_N1.float()).round().clamp(-128, 127).to(torch.int8), scale_N1)
    eight, top = torch.float8_e4m3fn, 448.0
    if scheme.layout == "fp8":
        scale_N1 = _stored(weight_NK.abs().amax(1, keepdim=True) / top, dtype)
        return Rounded((weight_NK / scale_N1.float()).clamp(-top, top).to(eight), scale_N1)
    rows, columns = weight_NK.shape[0] // BLOCK, weight_NK.shape[1] // BLOCK
    blocks = weight_NK.view(rows, BLOCK, columns, BLOCK)
    scale = _stored(blocks.abs().amax((1, 3)) / top, torch.float32)
    codes = (blocks / scale[:, None, :, None]).clamp(-top, top).to(eight)
    return Rounded(codes.view(weight_NK.shape), scale)


def group_scales(weight_NK: Tensor, scheme: Scheme, importance_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(scale, zero) of every group of an int4 weight, both [N, G].

    Without `importance_K` the group's extremes decide. With it each group takes the one of `SHRINKS` whose squared
    error, weighted by the importance of its inputs, is smallest.
    """
    import torch

    dtype = getattr(torch, TORCH_NAMES[scheme.dtype])
    size = scheme.group_size
    scales, zeros = [], []
    for rows in _rows(weight_NK):
        groups = weight_NK[rows].unflatten(1, (-1, size))
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        if importance_K is None:
            scale, zero = _candidate(low, high, scheme.symmetric, dtype)
        else:
            weights = importance_K.unflatten(0, (-1, size))
            best = torch.full_like(low, torch.inf)
            scale, zero = low.to(dtype), low.to(torch.uint8)
            for shrink in SHRINKS:
                tried, at = _candidate(low * shrink, high * shrink, scheme.symmetric, dtype)
                error = (_on_grid(groups, tried, at) - groups).square_().mul_(weights).sum(2)
                better = error < best
                best = torch.where(better, error, best)
                scale, zero = torch.where(better, tried, scale), torch.where(better, at, zero)
        scales.append(scale)
        zeros.append(zero)
    return torch.cat(scales), torch.cat(zeros)


def _candidate(low: Tensor, high: Tensor, symmetric: bool, dtype: Any) -> tuple[Tensor, Tensor]:
    import torch

    if symmetric:
        scale = _stored(torch.maximum(-low, high) / 7.5, dtype)
        return scale, torch.full_like(scale, 8, dtype=torch.uint8)
    scale = _stored((high - low) / 15, dtype)
    return scale, (-low / scale.float()).round().clamp(0, 15).to(torch.uint8)


def _on_grid(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    step, offset = scale.float()[..., None], zero.float()[..., None]
    return (groups / step + offset).round_().clamp_(0, 15).sub_(offset).mul_(step)


def encode(weight_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor, size: int) -> Tensor:
    """Codes 0 to 15 [N, K] uint8 of an int4 weight on a given grid."""
    import torch

    groups = weight_NK.unflatten(1, (-1, size))
    codes = (groups / scale_NG.float()[..., None] + zero_NG.float()[..., None]).round_().clamp_(0, 15)
    return codes.to(torch.uint8).flatten(1)


def dequantize(rounded: Rounded) -> Tensor:
    """What a reader computes, [N, K] float32."""
    scale = rounded.scale.float()
    if rounded.zero is not None:
        groups = rounded.codes.unflatten(1, (scale.shape[1], -1)).float()
        return ((groups - rounded.zero.float()[..., None]) * scale[..., None]).flatten(1)
    if scale.shape[1] == 1 and scale.shape[0] == rounded.codes.shape[0]:
        return rounded.codes.float() * scale
    blocks = rounded.codes.float().view(scale.shape[0], BLOCK, scale.shape[1], BLOCK)
    return (blocks * scale[:, None, :, None]).view(rounded.codes.shape)


def _stored(scale: Tensor, dtype: Any) -> Tensor:
    """Scales as they are stored: never 0, never infinite."""
    import torch

    kept = scale.clamp(min=torch.finfo(dtype).smallest_normal).to(dtype)
    if not bool(torch.isfinite(kept).all()):
        raise StageError(
            f"a scale of {float(scale.max()):.3g} does not fit into {str(dtype).removeprefix('torch.')}",
            hint="choose `dtype: bf16`",
        )
    return kept


def _rows(weight_NK: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK // weight_NK.shape[1])
    return (slice(start, start + step) for start in range(0, weight_NK.shape[0], step))
