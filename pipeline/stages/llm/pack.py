"""Rounded weights as the tensors of a checkpoint, in the layout of a scheme.

Legend: N output channels, K inputs, G groups of a row.
"""

from __future__ import annotations

from typing import Any

from pipeline.stages.llm.grid import Rounded
from pipeline.stages.llm.scheme import Scheme

Tensor = Any
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of an AWQ word holds the column 8 c + AWQ_ORDER[i]."""


def pack(name: str, rounded: Rounded, scheme: Scheme) -> dict[str, Tensor]:
    """Tensor name -> tensor of one linear called `name`."""
    import torch

    if scheme.layout == "w4a16":
        found = {
            f"{name}.weight_packed": words(rounded.codes, 1),
            f"{name}.weight_scale": rounded.scale,
            f"{name}.weight_shape": torch.tensor(rounded.codes.shape, dtype=torch.int64),
        }
        if not scheme.symmetric:
            found[f"{name}.weight_zero_point"] = words(rounded.zero, 0)
        return found
    if scheme.layout == "awq":
        assert rounded.zero is not None
        return {
            f"{name}.qweight": words(rounded.codes.T.contiguous(), 1, AWQ_ORDER),
            f"{name}.qzeros": words(rounded.zero.T.contiguous(), 1, AWQ_ORDER),
            f"{name}.scales": rounded.scale.T.contiguous(),
        }
    if scheme.layout == "gptq":
        assert rounded.zero is not None
        inputs = torch.arange(rounded.codes.shape[1], dtype=torch.int32)
        return {
            f"{name}.qweight": words(rounded.codes.T.contiguous(), 0),
            # The first GPTQ format stores zero points less one.
            f"{name}.qzeros": words((rounded.zero.T - 1).contiguous(), 1),
            f"{name}.scales": rounded.scale.T.contiguous(),
            f"{name}.g_idx": inputs // scheme.group_size,
        }
    suffix = "weight_scale_inv" if scheme.layout == "fp8-block" else "weight_scale"
    return {f"{name}.weight": rounded.codes, f"{name}.{suffix}": rounded.scale}


def words(nibbles: Tensor, axis: int, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> Tensor:
    """Values 0 to 15 [R, C] packed eight to an int32 along an axis; nibble i (from the low end) holds `order[i]`."""
    import torch

    parts = nibbles.unflatten(axis, (-1, 8)).to(torch.int32)
    packed = torch.zeros_like(parts.select(axis + 1, 0))
    for place, column in enumerate(order):
        packed |= parts.select(axis + 1, column) << (4 * place)
    return packed
