"""Stage onnx.encoder: export an encoder of a known family, without torch and without copying a weight.

`model.onnx` has standard operators alone (opset 23) and refers to the tensors where the checkpoint's safetensors files
have them, as onnx.fused does for decoders. What it costs instead of torch's exporter is in docs/benchmarks.md.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pipeline.frozen import frozen
from pipeline.recipe import Task, option
from pipeline.step import Inputs, Progress, Stage

if TYPE_CHECKING:
    from pathlib import Path


@frozen(kw_only=True)
class EncoderOptions:
    """What the exporter can be asked for."""

    task: Task = option("feature-extraction", "What the model does.")


def run(inputs: Inputs, options: EncoderOptions, out: Path, progress: Progress) -> None:
    """inputs: model. Writes model.onnx and export.json (see the errors of checkpoint, onnx_encoder_graph)."""
    import onnx

    from pipeline.parity.pooling import read_pooling
    from pipeline.stages.checkpoint import Checkpoint
    from pipeline.stages.onnx.encoder_families import read_encoder
    from pipeline.stages.onnx.encoder_graph import build_encoder

    checkpoint = Checkpoint(inputs["model"])
    encoder = read_encoder(checkpoint.config, options.task)
    pooling = read_pooling(inputs["model"]) if options.task == "feature-extraction" else None
    progress(0, 1, "graph")
    model = build_encoder(encoder, checkpoint, pooling).model()
    onnx.save_model(model, out / "model.onnx")
    interface = {
        role: [port_of(value) for value in values]
        for role, values in (("inputs", model.graph.input), ("outputs", model.graph.output))
    }
    export = {
        "exporter": "fused",
        "task": options.task,
        "kind": "encoder",
        "components": {"model": "model.onnx"},
        "interface": interface,
        "decoder": None,
        "pooling": pooling.mode if pooling else None,
    }
    (out / "export.json").write_text(json.dumps(export, indent=2) + "\n", encoding="utf-8")
    progress(1, 1, "graph")


def port_of(value: Any) -> dict[str, Any]:
    """An input or output of a graph as export.json lists it."""
    import onnx

    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return {"name": value.name, "dtype": str(dtype), "shape": [d.dim_param or d.dim_value for d in tensor.shape.dim]}


STAGE = Stage("onnx.encoder", run, version=1, tools=("numpy", "onnx"))
