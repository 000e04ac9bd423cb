"""How large a checkpoint is, as far as its files and config.json tell; from it a stage says what memory it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.frozen import frozen

FP32 = 4
STORED = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
"""Bytes of a value, by the word that config.json has for its type."""

SHARES = {"fp32": 1.0, "fp16": 0.5, "bf16": 0.5, "fp8": 0.4, "int8": 0.4, "int4": 0.28}
"""Most that the weights of an engine take of the fp32 weights: embeddings may stay as they are."""
ONE_FILE = 128 << 20
"""Bytes up to which an ONNX file holds its weights."""


@frozen
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


LARGE = 8 << 30
"""fp32 weights above which a decoder is not loaded whole, nor an engine of it made in fp32 to compare with."""

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

    `weights` counts by the option `share` of the stage, if it has one: what it loads may be smaller than fp32. `logits`
    counts times the logits of one sample, by the option `length` (256 without one).
    """

    def need(options: Any, size: Size) -> int:
        rows = int(getattr(options, "length", 0) or 256)
        held = weights * size.weights * float(getattr(options, "share", 1))
        return base_mb * 1_000_000 + int(
            held + largest * size.largest + layer * size.layer + logits * rows * size.vocab
        )

    return need


def placing(options: Any, size: Size) -> int:
    """The need of a stage that writes an ONNX file: streamed, or built in memory where one file holds the weights."""
    return _placed(options, size, streamed=110_000_000 + int(0.6 * size.largest))


def placing_blocks(options: Any, size: Size) -> int:
    """The same for one that quantizes to int8 and int4 block by block, and so holds no whole tensor for them."""
    if getattr(options, "precision", "") not in ("int8", "int4"):
        return placing(options, size)
    return _placed(options, size, streamed=70_000_000 + int(0.1 * size.largest))


def _placed(options: Any, size: Size, streamed: int) -> int:
    made = int(size.weights * SHARES.get(str(getattr(options, "precision", "fp16")), 0.5))
    return streamed if made > ONE_FILE else max(streamed, 72_000_000 + int(3.8 * made))


SMALL = holding(72)
"""A process that loads no framework and holds no tensor."""
