"""Stage onnx.fused: export a decoder as ONNX Runtime's fused graph, without torch and without copying a weight.

`model.onnx` refers to the tensors where the checkpoint's safetensors files have them (external data: file name, offset,
length); a Cast to fp32 stands behind those stored as bf16 or fp16. So the export costs a second and a few hundred
kilobytes, and every target of a recipe shares it. It becomes a model that a runtime loads by onnxruntime.weights.
"""

from __future__ import annotations

import json
from pathlib import Path

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
    from pipeline.stages.decoder_export import decoder_export, served_context
    from pipeline.stages.onnx.decoder import build_decoder
    from pipeline.stages.onnx.families import read_decoder

    checkpoint = Checkpoint(inputs["model"])
    decoder = read_decoder(checkpoint.config)
    context = served_context(decoder, options.context_length)
    progress(0, 1, "graph")
    graph = build_decoder(decoder, checkpoint, context)
    onnx.save_model(graph.model(), out / "model.onnx")
    files = {"model": "model.onnx"}
    export = decoder_export(decoder, inputs["model"], exporter="fused", cache="gqa", context=context, components=files)
    (out / "export.json").write_text(json.dumps(export, indent=2) + "\n", encoding="utf-8")
    progress(1, 1, "graph")


STAGE = Stage("onnx.fused", run, version=1, tools=("numpy", "onnx"))
