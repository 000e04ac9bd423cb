"""Stage onnx.optimum: export a model by Optimum, which knows many architectures, in a toolchain of its own.

Optimum holds its export against torch on one random batch and only warns when they differ: that is left out here,
because the parity stage judges every engine on the recipe's data.

Legend: B batch, P tokens in the cache.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from pipeline.errors import StageError, UnavailableError
from pipeline.frozen import frozen
from pipeline.recipe import Task, option
from pipeline.size import holding
from pipeline.stages.decoder_export import special_tokens
from pipeline.stages.onnx.torch import interface_of
from pipeline.stages.tasks import infer_task, kind_of, load_model, read_config
from pipeline.step import Inputs, Progress, Stage

_AXES = {
    "batch_size": "batch",
    "sequence_length": "sequence",
    "past_sequence_length": "past_sequence",
    "past_sequence_length + sequence_length": "total_sequence",
}
_CACHE_INPUT = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_TOKEN_INPUTS = {"input_ids", "attention_mask", "position_ids"}
_OLDER_NAMES = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
}
"""Member of rope_parameters (transformers 5) -> fields of config.json that transformers 4 reads instead."""


@frozen(kw_only=True)
class OptimumOptions:
    """What the exporter can be asked for."""

    task: Task | None = None
    """Inferred from config.json when None."""
    trust_remote_code: bool = False
    opset: int = option(18, "ONNX operator set of the graph.", ge=17, le=20)


def run(inputs: Inputs, options: OptimumOptions, out: Path, progress: Progress) -> None:
    """inputs: model. Writes model.onnx and export.json.

    UnavailableError for tasks and architectures that Optimum or this stage does not build, StageError when the export
    itself fails.
    """
    folder = inputs["model"]
    task = options.task or infer_task(folder)
    kind = kind_of(task)
    if kind == "seq2seq":
        raise UnavailableError(
            f"exporter: optimum does not build '{task}'", hint="leave `exporter` out, or say `torch`"
        )
    wanted = f"{task}-with-past" if kind == "decoder" else task
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        progress(0, 3, "load")
        older = _older_folder(folder, Path(scratch) / "model")
        model = load_model(older, task, trust_remote_code=options.trust_remote_code)
        _check_support(model.config.model_type, wanted)
        progress(1, 3, "export")
        graph = _export(model, wanted, options.opset, Path(scratch) / "export")
        progress(2, 3, "write")
        export = _decoder(graph, model, folder) if kind == "decoder" else _encoder(graph, task, folder)
        from pipeline.stages.onnx.torch_save import save_model

        save_model(graph, out / "model.onnx")
    document = {"exporter": "optimum", "task": task, "kind": kind, "components": {"model": "model.onnx"}, **export}
    (out / "export.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    progress(3, 3, "write")


def _check_support(model_type: Any, task: str) -> None:
    import optimum.exporters.onnx.model_configs  # noqa: F401  registers the architectures
    from optimum.exporters.tasks import TasksManager

    try:
        known = TasksManager.get_supported_tasks_for_model_type(model_type, "onnx", library_name="transformers")
    except (KeyError, AttributeError):
        known = {}
    if task not in known:
        found = f"builds {', '.join(sorted(known))} of it, not {task}" if known else "does not know it"
        raise UnavailableError(
            f"exporter: optimum: model_type {model_type!r}: Optimum {found}",
            hint="leave `exporter` out, or say `torch`",
        )


def _older_folder(folder: Path, place: Path) -> Path:
    """The model's folder as transformers 4 reads it: links, and config.json with rotary settings under the older names.

    Without that transformers 4 takes its defaults for what config.json of transformers 5 says in rope_parameters.
    """
    config = read_config(folder)
    rope = config.pop("rope_parameters", None)
    place = place / folder.name  # errors name the folder
    place.mkdir(parents=True)
    for path in folder.iterdir():
        if path.name != "config.json":
            (place / path.name).symlink_to(path.resolve())
    if isinstance(rope, dict):
        if any(isinstance(value, dict) for value in rope.values()):
            raise UnavailableError(
                f"{folder.name}/config.json: exporter: optimum cannot read rope_parameters that differ by layer",
                hint="leave `exporter` out, or say `torch`",
            )
        rest = {name: value for name, value in rope.items() if name not in _OLDER_NAMES}
        for name in rope.keys() - rest.keys():
            for older in _OLDER_NAMES[name]:
                config.setdefault(older, rope[name])
        if rest.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", rest)
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return place


def _export(model: Any, task: str, opset: int, place: Path) -> Any:
    """The graph that Optimum writes (onnx_ir.Model), without names of files, stack traces and shapes inside it."""
    import onnx_ir
    from optimum.exporters.onnx import onnx_export_from_model

    model.config.use_cache = task.endswith("-with-past")
    try:
        onnx_export_from_model(model, place, opset=opset, task=task, do_validation=False)
    except Exception as error:  # each architecture's code fails in its own way
        lines = str(error).strip().splitlines()[-3:] or [type(error).__name__]
        raise StageError(
            f"Optimum cannot export model_type '{model.config.model_type}': {' '.join(lines)}",
            hint="see the step's log; or leave `exporter` out, or say `torch`",
        ) from error
    graph = onnx_ir.load(place / "model.onnx")
    graph.doc_string = graph.graph.doc_string = None
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    for node in onnx_ir.traversal.RecursiveGraphIterator(graph.graph):
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*graph.graph.inputs, *graph.graph.outputs]:
        value.doc_string = None
        value.shape = onnx_ir.Shape([size if isinstance(size, int) else _axis(size.value) for size in value.shape])
    return graph


def _axis(name: str | None) -> str | None:
    return _AXES.get(name or "", name)


def _encoder(graph: Any, task: str, folder: Path) -> dict[str, Any]:
    from pipeline.parity.pooling import read_pooling
    from pipeline.stages.onnx.pool import add_pooling

    pooling = read_pooling(folder) if task == "feature-extraction" else None
    if pooling is not None:
        add_pooling(graph, pooling)
    return {"interface": interface_of(graph), "decoder": None, "pooling": pooling.mode if pooling else None}


def _decoder(graph: Any, model: Any, folder: Path) -> dict[str, Any]:
    layers, kv_heads, head_dim = _cache_shape(graph, model.config.model_type)
    config = model.config
    vocab = int(next(value for value in graph.graph.outputs if value.name == "logits").shape[-1])
    lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    tokens = [
        {"name": name, "dtype": "int64", "shape": ["batch", "sequence"]} for name in ("input_ids", "attention_mask")
    ]
    return {
        "interface": {
            "inputs": tokens,
            "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", "sequence", vocab]}],
        },
        "decoder": {
            "layers": layers,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "hidden_size": int(config.hidden_size),
            "heads": int(config.num_attention_heads),
            "vocab_size": vocab,
            "context_length": next((length for length in lengths if isinstance(length, int)), None),
            **special_tokens(folder),
            "cache": "concat",
        },
        "pooling": None,
    }


def _cache_shape(graph: Any, model_type: str) -> tuple[int, int, int]:
    """(layers, kv_heads, head_dim); UnavailableError when the cache is not [B, kv_heads, P, head_dim] everywhere."""
    cache = [value for value in graph.graph.inputs if _CACHE_INPUT.fullmatch(value.name)]
    others = sorted({value.name for value in graph.graph.inputs} - {value.name for value in cache} - _TOKEN_INPUTS)
    shapes = {tuple(value.shape[axis] for axis in (1, 3)) for value in cache if len(value.shape) == 4}
    plain = len(shapes) == 1 and all(isinstance(size, int) for size in next(iter(shapes)))
    if others or not plain or any(len(value.shape) != 4 for value in cache):
        found = f"the input '{others[0]}'" if others else f"a cache of {', '.join(str(v.shape) for v in cache[:2])}"
        raise UnavailableError(
            f"exporter: optimum: the graph of model_type '{model_type}' has {found}, which no runtime here serves",
            hint="leave `exporter` out, or say `torch`",
        )
    ((kv_heads, head_dim),) = shapes
    return len(cache) // 2, kv_heads, head_dim


TOOLS = ("torch", "transformers", "optimum", "optimum-onnx", "accelerate", "onnx", "onnx-ir")
"""accelerate finds tied weights, which are written once."""
STAGE = Stage("onnx.optimum", run, version=1, tools=TOOLS, toolchain="optimum", memory=holding(700, weights=3))
