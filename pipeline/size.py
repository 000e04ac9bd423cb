"""How large a checkpoint is, as far as its files and config.json tell; from it a stage says what memory it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FP32 = 4
STORED = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
"""Bytes of a value, by the word that config.json has for its type."""


@dataclass(frozen=True)
class Size:
    """Bytes, each as if it were fp32: what a value is stored in says little of what a stage makes of it."""

    weights: int
    """All tensors."""
    largest: int
    """The largest tensor: most often the embeddings."""
    layer: int
    """One layer of the stack."""
    vocab: int = 0
    """One row of logits."""
    hidden: int = 0
    """One row of hidden states."""


Need = Callable[[Any, Size], int]
"""(a stage's options, the checkpoint) -> the most that its process will hold, bytes."""


def size_of(stored_bytes: int, config: Mapping[str, Any]) -> Size:
    """The size of a checkpoint whose weights take so many bytes on disk. A config that tells little gives much."""
    told = {**config, **(config.get("text_config") or {})}

    def number(*names: str) -> int:
        return next((int(told[name]) for name in names if isinstance(told.get(name), int)), 0)

    weights = stored_bytes * FP32 // STORED.get(str(told.get("dtype") or told.get("torch_dtype") or "float32"), FP32)
    vocab, hidden = number("vocab_size"), number("hidden_size", "d_model", "n_embd")
    layers = number("num_hidden_layers", "n_layer", "num_layers", "encoder_layers")
    wide = number("intermediate_size", "n_inner", "encoder_ffn_dim", "d_ff") or 4 * hidden
    ends = vocab * hidden * FP32
    largest = min(weights, max(ends, wide * hidden * FP32)) or weights
    # An encoder-decoder has as many layers again: a layer is then taken as larger than it is.
    layer = max(0, weights - ends) // layers if layers else weights
    return Size(weights, largest, layer, vocab * FP32, hidden * FP32)


def holding(base_mb: int, *, weights: float = 0, largest: float = 0, layer: float = 0, logits: float = 0) -> Need:
    """A need of a constant, and of multiples of the parts of a checkpoint.

    `logits` counts times the logits of one sample, by the option `length` of the stage (256 without one).
    """

    def need(options: Any, size: Size) -> int:
        rows = int(getattr(options, "length", 0) or 256)
        parts = weights * size.weights + largest * size.largest + layer * size.layer + logits * rows * size.vocab
        return base_mb * 1_000_000 + int(parts)

    return need


SMALL = holding(150)
"""A process that loads no framework and holds no tensor."""
