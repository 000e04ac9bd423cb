"""What export.json says of a decoder: the same words whichever graph was made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import RecipeError

if TYPE_CHECKING:
    from pipeline.stages.onnx.families import Decoder


def decoder_export(
    decoder: Decoder,
    model: Path,
    *,
    exporter: str,
    cache: str,
    context: int,
    components: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The content of export.json.

    `model` is the checkpoint's folder, `cache` how the graph keeps keys and values, `context` what it serves in tokens,
    `components` its files of ONNX by their role.
    """
    return {
        "exporter": exporter,
        "task": "text-generation",
        "kind": "decoder",
        **({"components": dict(components)} if components else {}),
        "interface": {
            "inputs": [
                {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]},
                {"name": "attention_mask", "dtype": "int64", "shape": ["batch", "sequence"]},
            ],
            "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", "sequence", decoder.vocab]}],
        },
        "decoder": {
            "layers": decoder.layers,
            "kv_heads": decoder.kv_heads,
            "head_dim": decoder.head_dim,
            "hidden_size": decoder.hidden,
            "heads": decoder.heads,
            "vocab_size": decoder.vocab,
            "context_length": context,
            **special_tokens(model),
            "decoder_start_token_id": None,
            "cache": cache,
        },
        "pooling": None,
    }


def served_context(decoder: Decoder, asked: int | None) -> int:
    """Tokens that the engine serves: what was asked for, or all that the model has. Raises RecipeError for more."""
    if asked is not None and asked > decoder.context:
        raise RecipeError(
            f"context_length is {asked}, but the model's max_position_embeddings is {decoder.context}",
            hint=f"ask for at most {decoder.context}",
        )
    return asked or decoder.context


def special_tokens(model: Path) -> dict[str, Any]:
    """bos_token_id, eos_token_ids, pad_token_id, decoder_start_token_id: generation_config.json before config.json."""
    from pipeline.stages.checkpoint import read_json

    values = read_json(model / "config.json")
    if (model / "generation_config.json").exists():
        generation = read_json(model / "generation_config.json")
        values = {**values, **{key: value for key, value in generation.items() if value is not None}}
    eos = values.get("eos_token_id")
    return {
        "bos_token_id": values.get("bos_token_id"),
        "eos_token_ids": eos if isinstance(eos, list) else [] if eos is None else [eos],
        "pad_token_id": values.get("pad_token_id"),
        "decoder_start_token_id": values.get("decoder_start_token_id"),
    }
