"""Stage onnx.fused: export a decoder as ONNX Runtime's fused graph, without torch and without copying a weight.

`model.onnx` refers to the tensors where the checkpoint's safetensors files have them (external data: file name, offset,
length); a Cast to fp32 stands behind those stored as bf16 or fp16. So the export costs a second and a few hundred
kilobytes, and every target of a recipe shares it. It becomes a model that a runtime loads by onnxruntime.weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError
from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.step import Inputs, Progress, Stage


@frozen(kw_only=True)
class FusedOptions:
    """What the fused exporter can be asked for."""

    context_length: int | None = option(
        None, "Longest context that the engine serves. Not given: what config.json says.", unit="tokens", ge=1
    )


def run(inputs: Inputs, options: FusedOptions, out: Path, progress: Progress) -> None:
    """inputs: model. Writes model.onnx and export.json (see the class of errors in checkpoint, onnx_families)."""
    import onnx

    from pipeline.stages.checkpoint import Checkpoint
    from pipeline.stages.onnx.decoder import build_decoder
    from pipeline.stages.onnx.families import read_decoder

    checkpoint = Checkpoint(inputs["model"])
    decoder = read_decoder(checkpoint.config)
    context = options.context_length or decoder.context
    if context > decoder.context:
        raise RecipeError(
            f"context_length is {context}, but the model's max_position_embeddings is {decoder.context}",
            hint=f"ask for at most {decoder.context}",
        )
    progress(0, 1, "graph")
    graph = build_decoder(decoder, checkpoint, context)
    onnx.save_model(graph.model(), out / "model.onnx")
    export = {
        "exporter": "fused",
        "task": "text-generation",
        "kind": "decoder",
        "components": {"model": "model.onnx"},
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
            **special_tokens(inputs["model"]),
            "decoder_start_token_id": None,
            "cache": "gqa",
        },
        "pooling": None,
    }
    (out / "export.json").write_text(json.dumps(export, indent=2) + "\n", encoding="utf-8")
    progress(1, 1, "graph")


def special_tokens(model: Path) -> dict[str, Any]:
    """bos_token_id, eos_token_ids and pad_token_id: generation_config.json has precedence over config.json."""
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
    }


STAGE = Stage("onnx.fused", run, version=1, tools=("numpy", "onnx"))
