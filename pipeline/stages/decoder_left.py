"""Refuse a checkpoint with tensors for which a decoder of ours has no place: a model without them would be wrong."""

from __future__ import annotations

import re
from collections.abc import Collection

from pipeline.errors import StageError
from pipeline.stages.checkpoint import Checkpoint
from pipeline.stages.onnx.families import Decoder, Unknown

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_UNUSED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
"""Endings of tensors that old checkpoints carry and nobody reads."""


def refuse_left_over(checkpoint: Checkpoint, used: Collection[str], decoder: Decoder) -> None:
    """Raises StageError where config.json counts fewer layers, and UnavailableError for any other tensor left over."""
    for name in (name for name in checkpoint if name not in used and not name.endswith(_UNUSED)):
        if (layer := _LAYER.match(name)) and int(layer[1]) >= decoder.layers:
            raise StageError(
                f"config.json says num_hidden_layers is {decoder.layers}, but the checkpoint has tensor '{name}'",
                hint="config.json and the weights are not of the same model",
            )
        raise Unknown(
            f"the fused exporter has no place for the tensor '{name}' of a {decoder.family} model",
            hint="use the torch exporter for this model (exporter: torch)",
        )
