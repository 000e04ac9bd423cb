"""Complete an engine folder: genai_config.json, the tokenizer's files and engine.json beside the graphs.

ONNX Runtime GenAI reads genai_config.json, Transformers and Optimum read config.json and the tokenizer, Enginewright
reads engine.json: one folder serves them all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import StageError
from pipeline.stages.share import share

_COPIED = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)

_LARGE = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Up to 40 MB a model, and no stage writes to them."""

_GENAI_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
"""Types that GenAI knows by name. Others are `decoder`, phi3 too: by that name GenAI expects LongRoPE's two tables."""


def copy_model_files(model: Path, out: Path) -> list[str]:
    """Copy configuration files from a model folder, and share its vocabularies. Returns the names."""
    copied = [name for name in _COPIED if (model / name).is_file()]
    for name in copied:
        (share if name in _LARGE else shutil.copyfile)(model / name, out / name)
    return copied


def write_engine(
    out: Path,
    export: Mapping[str, Any],
    *,
    precision: str,
    quantization: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    runtime: str = "onnxruntime",
) -> None:
    """engine.json: what export.json says, and what was made of it."""
    engine = {
        **export,
        "runtime": runtime,
        "precision": precision,
        "quantization": quantization,
        "settings": dict(settings),
    }
    _write(out / "engine.json", engine)


def write_genai_config(
    out: Path, export: Mapping[str, Any], model: Path, *, threads: int, provider: str, file: str, positions: bool
) -> None:
    """genai_config.json for a decoder whose graph is `file`; `positions` says whether it has the input position_ids,
    `provider` is cpu or cuda.

    `threads` is for ONNX Runtime's intra-op pool; 0 is one thread a physical core, chosen where the model is loaded.
    Without the field GenAI takes half of the logical cores, which is one on a machine of two.
    """
    decoder = export["decoder"]
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    generation_path = model / "generation_config.json"
    generation = json.loads(generation_path.read_text(encoding="utf-8")) if generation_path.exists() else {}
    eos = list(decoder["eos_token_ids"])
    if not eos:
        raise StageError(
            "neither config.json nor generation_config.json has an eos_token_id",
            hint="add eos_token_id to generation_config.json: generation would never end",
        )
    pad = decoder["pad_token_id"]
    content = {
        "model": {
            "type": "decoder" if config.get("model_type") not in _GENAI_TYPES else config["model_type"],
            "context_length": decoder["context_length"],
            "vocab_size": decoder["vocab_size"],
            "bos_token_id": decoder["bos_token_id"] if decoder["bos_token_id"] is not None else eos[0],
            "eos_token_id": eos[0] if len(eos) == 1 else eos,
            "pad_token_id": pad if pad is not None else eos[0],
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "intra_op_num_threads": threads,
                    "provider_options": [] if provider == "cpu" else [{provider: {}}],
                },
                "filename": file,
                "head_size": decoder["head_dim"],
                "hidden_size": decoder["hidden_size"],
                "num_attention_heads": decoder["heads"],
                "num_hidden_layers": decoder["layers"],
                "num_key_value_heads": decoder["kv_heads"],
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **({"position_ids": "position_ids"} if positions else {}),
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": bool(generation.get("do_sample", False)),
            "temperature": float(generation.get("temperature") or 1.0),
            "top_k": int(generation.get("top_k") or 50),
            "top_p": float(generation.get("top_p") or 1.0),
            "repetition_penalty": float(generation.get("repetition_penalty") or 1.0),
            "length_penalty": float(generation.get("length_penalty") or 1.0),
            "num_beams": 1,
            "num_return_sequences": 1,
            "diversity_penalty": 0.0,
            "no_repeat_ngram_size": 0,
            "early_stopping": True,
            "min_length": 0,
            "max_length": decoder["context_length"],
            "past_present_share_buffer": decoder["cache"] == "gqa",
        },
    }
    _write(out / "genai_config.json", content)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
