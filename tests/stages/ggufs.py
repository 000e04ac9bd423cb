"""Random decoders of every family that become GGUF, and the stage that does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.stages.gguf import build as gguf_build
from pipeline.stages.gguf.build import BuildOptions
from pipeline.step import silent
from pipeline.targets.gguf_engine import LlamaEngine, open_engine
from tests.stages.decoders import write_decoder

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
"""Rows that K-quants' blocks of 256 divide."""
_HALF = [1.0 + 0.1 * place for place in range(16)]


def rope(kind: str, **more: Any) -> dict[str, Any]:
    """rope_parameters of transformers 5."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
_LONG = {"short_factor": _HALF, "long_factor": [2 * each for each in _HALF]}
_BASE = {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, llama3 rope": ("Llama", rope("llama3", **_LLAMA3)),
    "llama, biases, tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama, linear rope": ("Llama", rope("linear", factor=4.0)),
    "llama, yarn rope": ("Llama", rope("yarn", **_YARN)),
    "llama, yarn with a factor": ("Llama", rope("yarn", attention_factor=1.5, **_YARN)),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied, yarn rope": ("Qwen2", {"tie_word_embeddings": True, **rope("yarn", **_YARN)}),
    "qwen3": ("Qwen3", {"head_dim": 64}),
    "gemma": ("Gemma", {"head_dim": 64}),
    "gemma2": ("Gemma2", {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 32}),
    "gemma2, another base": ("Gemma2", {"head_dim": 64, "query_pre_attn_scalar": 64, **_BASE}),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 32, "num_hidden_layers": 7},
    ),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3, half of a head turns": ("Phi3", {"sliding_window": None, **rope("default", partial_rotary_factor=0.5)}),
    "phi3, long rope": (
        "Phi3",
        {"sliding_window": None, "max_position_embeddings": 1024, "original_max_position_embeddings": 512}
        | rope("longrope", **_LONG),
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
        | {"norm_topk_prob": True},
    ),
}


def family(path: Path, name: str, dtype: str = "float32", **over: Any) -> Path:
    """The model folder of an entry of FAMILIES."""
    kind, settings = FAMILIES[name]
    return write_decoder(path, kind, dtype, **{**SIZES, **settings, **over})


def build(model: Path, out: Path, label: str = "F32", inputs: dict[str, Path] | None = None, **options: Any) -> Path:
    """The folder that the stage writes."""
    out.mkdir(parents=True)
    told = BuildOptions(name="model", label=label, kv="F32" if label == "F32" else "F16", **options)  # type: ignore[arg-type]
    gguf_build.run({"model": model, **(inputs or {})}, told, out, silent)
    return out


def engine(model: Path, out: Path, label: str = "F32", **options: Any) -> LlamaEngine:
    """Built and opened."""
    return open_engine(build(model, out, label, **options))


def reference(model: Path, ids: Any) -> Any:
    """Logits [T, V] of transformers at fp32 for ids [T]."""
    import torch
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return loaded(torch.tensor(ids)[None]).logits[0].numpy()


def divergence(expected: Any, found: Any) -> float:
    """Mean KL divergence of logits [T, V]."""

    def log_softmax(logits: Any) -> Any:
        wide = logits.astype(np.float64)
        wide -= wide.max(-1, keepdims=True)
        return wide - np.log(np.exp(wide).sum(-1, keepdims=True))

    p, q = log_softmax(expected), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(-1).mean())
