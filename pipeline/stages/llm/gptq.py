"""GPTQ: round a weight column by column, and let the columns that follow make good what each rounding lost.

Columns go in the order of how much their inputs matter; the groups' scales are chosen before, in the stored order, so
that a reader needs no permutation (act-order static).

Legend: N output channels, K inputs.
"""

from __future__ import annotations

from typing import Any

from pipeline.errors import StageError
from pipeline.stages.llm.grid import Rounded, group_scales
from pipeline.stages.llm.scheme import Scheme

Tensor = Any
BLOCK = 128
"""Columns that are worked on before the rest of the weight is updated."""


def gptq_weight(weight_NK: Tensor, gram_KK: Tensor, scheme: Scheme, damping: float) -> Rounded:
    """A float32 weight on its grid, given the Gram matrix of its inputs (mean of x x^T). Raises StageError."""
    import torch

    gram = gram_KK.double()
    importance = gram.diagonal().float()
    scale_NG, zero_NG = group_scales(weight_NK, scheme, importance)
    weight = weight_NK.clone()
    dead = gram.diagonal() == 0
    gram[dead, dead] = 1
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    inverse = _inverse(gram[order][:, order], damping).float()
    weight = weight[:, order]
    group_of = (order // scheme.group_size).tolist()
    scales, zeros = scale_NG.float(), zero_NG.float()
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    columns = weight.shape[1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, errors = weight[:, start:stop].clone(), torch.zeros(weight.shape[0], stop - start)
        for at in range(stop - start):
            scale, zero = scales[:, group_of[start + at]], zeros[:, group_of[start + at]]
            column = block[:, at]
            code = (column / scale + zero).round().clamp(0, 15)
            codes[:, start + at] = code.to(torch.uint8)
            error = (column - (code - zero) * scale) / inverse[start + at, start + at]
            block[:, at:] -= error[:, None] * inverse[start + at, start + at : stop]
            errors[:, at] = error
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    back = torch.argsort(order)
    return Rounded(codes[:, back].contiguous(), scale_NG, zero_NG)


def _inverse(gram: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse, of a Gram matrix with `damping` of its mean diagonal added."""
    import torch

    mean = gram.diagonal().mean()
    for _ in range(6):
        damped = gram.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not int(failed):
                return inverse
        damping *= 10
    raise StageError(
        "GPTQ: the activations of a layer do not give an invertible matrix",
        hint="give more calibration data, or say `method: awq`",
    )
