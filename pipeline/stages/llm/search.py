"""Scales of input channels (AWQ, SmoothQuant), and taking them out again in what writes these channels.

Both methods multiply the columns of a weight by s and divide its input by s. The division is folded into the norm, or
into the rows of the linear, that writes the input. A folded norm is stored in 16 bits: s is then what the stored norm
makes of it, so that folding itself loses nothing.

Legend: N output channels, K inputs, R sampled rows of activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.stages.llm.family import Family, Fold
from pipeline.stages.llm.grid import dequantize, round_weight
from pipeline.stages.llm.scheme import TORCH_NAMES, Scheme

Tensor = Any
Weights = dict[str, Tensor]
"""Tensor name within the layer -> float32."""
Seen = Mapping[str, Mapping[str, Tensor]]
"""Linear -> absmax [K], meansq [K], rows [R, K]."""
SEARCHED_ROWS = 768
"""Output channels of each weight that the search looks at: evenly spread, all of a small model."""
RATIOS = tuple(step / 20 for step in range(1, 21))


def fold_layer(weights: Weights, family: Family, scheme: Scheme, seen: Seen, smoothing: float) -> dict[str, Tensor]:
    """Scale a layer's weights in place; fold's source -> s [K], for the folds where scaling pays."""
    applied: dict[str, Tensor] = {}
    for fold in family.folds:
        stats = seen[fold.to[0]]
        if scheme.method == "awq":
            scale_K = awq_scale([weights[f"{name}.weight"] for name in fold.to], stats, scheme)
        elif fold.norm:
            scale_K = smooth_scale([weights[f"{name}.weight"] for name in fold.to], stats, smoothing)
        else:
            continue
        if scale_K is not None:
            applied[fold.source] = _apply(weights, fold, scale_K, family.norm_offset, scheme)
    return applied


def awq_scale(weights: list[Tensor], stats: Mapping[str, Tensor], scheme: Scheme) -> Tensor | None:
    """The s [K] of a grid that brings the products of the sampled activations nearest; None when none beats 1.

    Candidates are x ** r and x ** r / w ** (1 - r), where x is the mean magnitude of an input and w that of its
    weights, each normalised to the geometric middle of its extremes.
    """
    rows_RK, x_K = stats["rows"], stats["rows"].abs().mean(0).clamp(min=1e-6)
    parts = [weight[:: max(1, weight.shape[0] // SEARCHED_ROWS)] for weight in weights]
    w_K = _mean_share(parts, scheme.group_size)
    best, chosen = _loss(parts, rows_RK, None, scheme), None
    for ratio in RATIOS:
        for scale_K in (x_K**ratio, x_K**ratio / w_K ** (1 - ratio)):
            scale_K = scale_K.clamp(min=1e-4)
            scale_K = scale_K / (scale_K.max() * scale_K.min()).sqrt()
            loss = _loss(parts, rows_RK, scale_K, scheme)
            if loss < best:
                best, chosen = loss, scale_K
    return chosen


def _mean_share(weights: list[Tensor], size: int) -> Tensor:
    """Mean over output channels of a weight's magnitude relative to the largest of its group, [K]."""
    import torch

    groups = torch.cat(weights).abs().unflatten(1, (-1, size))
    return (groups / groups.amax(2, keepdim=True).clamp(min=1e-9)).flatten(1).mean(0).clamp(min=1e-4)


def _loss(weights: list[Tensor], rows_RK: Tensor, scale_K: Tensor | None, scheme: Scheme) -> float:
    """Sum of the squared errors of the products of the sampled rows with the rounded weights."""
    total = 0.0
    for weight in weights:
        scaled = weight if scale_K is None else weight * scale_K
        rounded = dequantize(round_weight(scaled, scheme))
        error = (rounded if scale_K is None else rounded / scale_K) - weight
        total += float((rows_RK @ error.T).square().sum())
    return total


def smooth_scale(weights: list[Tensor], stats: Mapping[str, Tensor], smoothing: float) -> Tensor:
    """s [K] = max |x| ** a / max |w| ** (1 - a)."""
    import torch

    x_K = stats["absmax"].clamp(min=1e-5)
    w_K = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).clamp(min=1e-5)
    return (x_K**smoothing / w_K ** (1 - smoothing)).clamp(min=1e-5)


def _apply(weights: Weights, fold: Fold, scale_K: Tensor, norm_offset: float, scheme: Scheme) -> Tensor:
    """Multiply the columns of `fold.to`, divide the source. Returns the s that was applied."""
    import torch

    source = f"{fold.source}.weight"
    if fold.norm:
        norm_K = weights[source] + norm_offset
        kept_K = (norm_K / scale_K - norm_offset).to(getattr(torch, TORCH_NAMES[scheme.dtype])).float()
        exact = norm_K / (kept_K + norm_offset)
        # A channel that the norm switches off stays as it is.
        usable = torch.isfinite(exact) & (exact > 0)
        scale_K = torch.where(usable, exact, torch.ones_like(exact))
        weights[source] = torch.where(usable, kept_K, weights[source])
    else:
        weights[source] = weights[source] / scale_K[:, None]
        if f"{fold.source}.bias" in weights:
            weights[f"{fold.source}.bias"] = weights[f"{fold.source}.bias"] / scale_K
    for name in fold.to:
        weights[f"{name}.weight"] = weights[f"{name}.weight"] * scale_K
    return scale_K
