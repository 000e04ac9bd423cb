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
    from pipeline.stages.decoder_export import decoder_export
    from pipeline.stages.onnx.families import read_decoder
    from pipeline.stages.tensorrt.decoder_graph import build_static_decoder

    checkpoint = Checkpoint(inputs["model"])
    decoder = read_decoder(checkpoint.config)
    progress(0, 1, "graph")
    graph = build_static_decoder(decoder, checkpoint, options.cache_length)
    onnx.save_model(graph.model(), out / "model.onnx")
    files, context = {"model": "model.onnx"}, options.cache_length
    export = decoder_export(
        decoder, inputs["model"], exporter="static", cache="static", context=context, components=files
    )
    (out / "export.json").write_text(json.dumps(export, indent=2) + "\n", encoding="utf-8")
    progress(1, 1, "graph")


STAGE = Stage("tensorrt.decoder", run, version=1, tools=("numpy", "onnx"))
