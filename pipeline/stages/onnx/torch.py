"""Stage onnx.torch: export any model that transformers loads, by torch's dynamo exporter.

Opset 23 is the default: Attention, RMSNormalization and RotaryEmbedding are operators there. MiniLM (6 layers, 96
sentences in batches of 8, one thread): 106 sentences/s with opset 20 and with opset 23, 29 and 30 at 128 tokens each;
decoders gain 20-25 % in decoding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.frozen import frozen
from pipeline.recipe import Task, option
from pipeline.size import holding
from pipeline.stages.decoder_export import special_tokens
from pipeline.stages.tasks import infer_task, kind_of, load_model, paused_collector
from pipeline.step import Inputs, Progress, Stage


@frozen(kw_only=True)
class TorchExportOptions:
    """What the exporter can be asked for."""

    task: Task | None = None
    """Inferred from config.json when None."""
    trust_remote_code: bool = False
    opset: int = option(23, "ONNX operator set of the graph.", ge=20, le=23)


def run(inputs: Inputs, options: TorchExportOptions, out: Path, progress: Progress) -> None:
    """inputs: model. Writes model.onnx, or encoder.onnx and decoder.onnx, and export.json."""
    folder = inputs["model"]
    task = options.task or infer_task(folder)
    kind = kind_of(task)
    progress(0, 3, "load")
    model = load_model(folder, task, trust_remote_code=options.trust_remote_code)
    progress(1, 3, "export")
    with paused_collector():
        export = _EXPORTERS[kind](model, task, folder, options, out, progress)
    document = {"exporter": "torch", "task": task, "kind": kind, **export}
    (out / "export.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    progress(3, 3, "export")


def _encoder(
    model: Any, task: str, folder: Path, options: TorchExportOptions, out: Path, progress: Progress
) -> dict[str, Any]:
    from pipeline.stages.onnx.torch_encoder import export_encoder
    from pipeline.stages.onnx.torch_save import save_model

    graph, pooling = export_encoder(model, task, folder, options.opset)
    progress(2, 3, "write")
    save_model(graph, out / "model.onnx")
    return {
        "components": {"model": "model.onnx"},
        "interface": interface_of(graph),
        "decoder": None,
        "pooling": pooling.mode if pooling else None,
    }


def _decoder(
    model: Any, task: str, folder: Path, options: TorchExportOptions, out: Path, progress: Progress
) -> dict[str, Any]:
    from pipeline.stages.onnx.torch_decoder import export_decoder
    from pipeline.stages.onnx.torch_save import save_model

    graph, (layers, kv_heads, head_dim) = export_decoder(model, options.opset)
    progress(2, 3, "write")
    save_model(graph, out / "model.onnx")
    vocab = int(graph.graph.outputs[0].shape[-1])
    return {
        "components": {"model": "model.onnx"},
        "interface": _language_interface([("input_ids", "sequence"), ("attention_mask", "sequence")], vocab),
        "decoder": _decoder_facts(model, folder, layers, kv_heads, head_dim, vocab),
        "pooling": None,
    }


def _seq2seq(
    model: Any, task: str, folder: Path, options: TorchExportOptions, out: Path, progress: Progress
) -> dict[str, Any]:
    from pipeline.stages.onnx.torch_save import save_model
    from pipeline.stages.onnx.torch_seq2seq import export_seq2seq

    graphs = export_seq2seq(model, options.opset)
    progress(2, 3, "write")
    save_model(graphs.encoder, out / "encoder.onnx")
    save_model(graphs.decoder, out / "decoder.onnx")
    vocab = int(graphs.decoder.graph.outputs[0].shape[-1])
    sources = [_port(value) for value in graphs.encoder.graph.inputs]
    language = _language_interface([("decoder_input_ids", "sequence")], vocab)
    return {
        "components": {"encoder": "encoder.onnx", "decoder": "decoder.onnx"},
        "interface": {"inputs": [*sources, *language["inputs"]], "outputs": language["outputs"]},
        "decoder": _decoder_facts(model, folder, graphs.layers, graphs.kv_heads, graphs.head_dim, vocab),
        "pooling": None,
    }


def _language_interface(inputs: list[tuple[str, str]], vocab: int) -> dict[str, list[dict[str, Any]]]:
    """What Engine.run takes and gives: the runtime carries the cache."""
    logits = {"name": "logits", "dtype": "float32", "shape": ["batch", "sequence", vocab]}
    return {
        "inputs": [{"name": name, "dtype": "int64", "shape": ["batch", axis]} for name, axis in inputs],
        "outputs": [logits],
    }


def _decoder_facts(model: Any, folder: Path, layers: int, kv_heads: int, head_dim: int, vocab: int) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None)
    if model.config.is_encoder_decoder:
        heads = getattr(config, "decoder_attention_heads", heads)
    return {
        "layers": layers,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": int(config.hidden_size),
        "heads": int(heads or kv_heads),
        "vocab_size": vocab,
        "context_length": _context_length(config),
        **special_tokens(folder),
        "cache": "concat",
    }


def _context_length(config: Any) -> int | None:
    """How many tokens the decoder has positions for; None where positions are relative, and nothing bounds them."""
    for name in ("max_target_positions", "max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and not (name == "n_positions" and config.model_type in ("t5", "mt5", "umt5")):
            return value
    return None


def interface_of(graph: Any) -> dict[str, list[dict[str, Any]]]:
    """The graph's inputs and outputs as export.json lists them."""
    return {
        "inputs": [_port(value) for value in graph.graph.inputs],
        "outputs": [_port(value) for value in graph.graph.outputs],
    }


def _port(value: Any) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size.value) for size in value.shape]
    return {"name": value.name, "dtype": str(value.dtype.numpy()), "shape": shape}


_EXPORTERS = {"encoder": _encoder, "decoder": _decoder, "seq2seq": _seq2seq}

STAGE = Stage(
    "onnx.torch",
    run,
    version=1,
    tools=("torch", "transformers", "onnx", "onnx-ir", "onnxscript"),
    memory=holding(560, weights=1.7),
)
