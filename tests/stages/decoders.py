"""Random decoders of every family, engines built from them, and ways to run both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.stages.onnx import fused as onnx_fused
from pipeline.stages.onnx import weights as onnx_weights
from pipeline.stages.onnx.fused import FusedOptions
from pipeline.stages.onnx.weights import WeightOptions
from pipeline.step import silent
from tests.models import BOS, EOS, PAD, VOCAB, write_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-rope-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-rope-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-rope-yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "attention_bias": True}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": ("Gemma2", {"head_dim": 32, "sliding_window": 6, "query_pre_attn_scalar": 24}),
    "gemma3_text": ("Gemma3Text", {"head_dim": 32, "sliding_window": 6, "final_logit_softcapping": 20.0}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-partial": ("Phi3", {"sliding_window": 6, "partial_rotary_factor": 0.5, "hidden_size": 128}),
}
PADDINGS = {"none": ([0], [0]), "left": ([0, 5, 9], [0] * 3), "right": ([0] * 3, [0, 4, 11]), "both": ([3, 0], [2, 7])}


def write_decoder(path: Path, kind: str, dtype: str = "float32", shard: str = "5GB", **over: Any) -> Path:
    """A model folder of the config class `kind`, every tensor random: norms about 1, biases not 0."""
    import torch
    import transformers

    config = getattr(transformers, f"{kind}Config")(**(SIZES | over))
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_((0.0 if "gemma" in config.model_type else 1.0) + 0.3 * noise)
            else:
                parameter.copy_(noise * (0.3 if parameter.ndim == 1 else 1.5 / parameter.shape[-1] ** 0.5))
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=shard)
    write_tokenizer(path, padding_side="left")
    return path


def export(model: Path, out: Path, **options: Any) -> Path:
    out.mkdir(parents=True)
    onnx_fused.run({"model": model}, FusedOptions(**options), out, silent)
    return out


def engine(model: Path, out: Path, exported: Path | None = None, **options: Any) -> Path:
    """Export (unless that was done) and give it weights."""
    exported = exported or export(model, out.with_name(f"{out.name}.export"))
    out.mkdir(parents=True)
    onnx_weights.run({"model": model, "export": exported}, WeightOptions(**options), out, silent)
    return out


def session(folder: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def step(run: Any, ids: Any, mask: Any, past: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
    """(logits [B, S, V], the cache after it) of one call."""
    feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    for value in run.get_inputs():
        if value.name.startswith("past"):
            kind = np.float16 if "float16" in value.type else np.float32
            empty = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), kind)
            feeds[value.name] = past[value.name] if past else empty
    names = [output.name for output in run.get_outputs()]
    outputs = dict(zip(names, run.run(None, feeds), strict=True))
    logits = outputs.pop("logits")
    return logits, {name.replace("present", "past_key_values"): value for name, value in outputs.items()}


def reference(model: Path) -> Any:
    """The model in torch, fp32. Eager attention: Gemma 2's soft caps are lost in sdpa."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()


def reference_logits(torch_model: Any, ids: Any, mask: Any) -> Any:
    """Logits [B, T, V] with positions counted from the first real token."""
    import torch

    positions = np.clip(np.cumsum(mask, 1) - 1, 0, None)
    with torch.no_grad():
        return torch_model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions)
        ).logits.numpy()
