"""Stage tensorrt.decoder: export a decoder with a static KV cache, without torch and without copying a weight.

Like onnx.fused, `model.onnx` refers to the tensors where the checkpoint's safetensors files have them; it becomes a
model by tensorrt.graph, which gives every tensor its type.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.step import Inputs, Progress, Stage


@frozen(kw_only=True)
class StaticOptions:
    """What the exporter can be asked for."""

    cache_length: int = option(2048, "How many tokens the KV cache holds.", unit="tokens", ge=1)


def run(inputs: Inputs, options: StaticOptions, out: Path, progress: Progress) -> None:
    """inputs: model. Writes model.onnx and export.json."""
    import onnx

    from pipeline.stages.checkpoint import Checkpoint
    from pipeline.stages.onnx.families import read_decoder
    from pipeline.stages.onnx.fused import special_tokens
    from pipeline.stages.tensorrt.decoder_graph import build_static_decoder

    checkpoint = Checkpoint(inputs["model"])
    decoder = read_decoder(checkpoint.config)
    progress(0, 1, "graph")
    graph = build_static_decoder(decoder, checkpoint, options.cache_length)
    onnx.save_model(graph.model(), out / "model.onnx")
    export = {
        "exporter": "static",
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
            "context_length": options.cache_length,
            **special_tokens(inputs["model"]),
            "decoder_start_token_id": None,
            "cache": "static",
        },
        "pooling": None,
    }
    (out / "export.json").write_text(json.dumps(export, indent=2) + "\n", encoding="utf-8")
    progress(1, 1, "graph")


STAGE = Stage("tensorrt.decoder", run, version=1, tools=("numpy", "onnx"))
