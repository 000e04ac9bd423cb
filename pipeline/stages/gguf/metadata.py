"""The keys of a GGUF file: the model's shape, its tokenizer, its chat template, and what the file is called."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pipeline.stages.checkpoint import read_json
from pipeline.stages.gguf.families import Model
from pipeline.stages.gguf.rope import rope_keys
from pipeline.stages.gguf.vocab import Vocab

_SPECIAL = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unknown": "unknown", "padding": "padding"}


def add_keys(
    writer: Any, model: Model, vocab: Vocab, *, name: str, ftype: int, template: str | None, license: str
) -> None:
    """Fill a gguf.GGUFWriter. `name` is the recipe's; `template` the chat template in Jinja."""
    import gguf

    writer.add_type("model")
    writer.add_name(general_name(name, vocab))
    if license:
        writer.add_license(license)
    writer.add_file_type(ftype)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(model.layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(model.intermediate)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.epsilon)
    writer.add_vocab_size(len(vocab.tokens))
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(model.experts_used)
        writer.add_expert_feed_forward_length(model.intermediate)
    writer.add_rope_freq_base(model.rope.theta)
    if model.local_theta:
        writer.add_float32(f"{model.arch}.rope.freq_base_swa", model.local_theta)
    for key, value in (*rope_keys(model.rope).items(), *model.keys):
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{model.arch}.{key}", value)
    _add_vocab(writer, vocab)
    if template:
        writer.add_chat_template(template)


def general_name(name: str, vocab: Vocab) -> str:
    """`general.name`. To llama.cpp a name with `phi3` or `phi-3` means that special tokens eat the whitespace after."""
    if vocab.strips:
        return name if re.search("phi-?3", name, re.IGNORECASE) else f"{name} (phi-3 tokens)"
    return re.sub(r"(phi)-?(3)", r"\1_\2", name, flags=re.IGNORECASE)


def _add_vocab(writer: Any, vocab: Vocab) -> None:
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(list(vocab.tokens))
    writer.add_token_types(list(vocab.types))
    if vocab.model == "llama":
        writer.add_token_scores(list(vocab.scores))
        writer.add_add_space_prefix(vocab.space_prefix)
    else:
        writer.add_token_merges(list(vocab.merges))
    for name, key in _SPECIAL.items():
        if name in vocab.special:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", vocab.special[name])
    # Both, always: what is not there is another thing for each pre-tokenizer.
    writer.add_add_bos_token(vocab.add_bos)
    writer.add_add_eos_token(vocab.add_eos)


def chat_template(model: Path) -> str | None:
    """The model's default chat template in Jinja, from where transformers takes it; None if it has none."""
    if (model / "chat_template.jinja").is_file():
        return (model / "chat_template.jinja").read_text("utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = read_json(model / name).get("chat_template") if (model / name).is_file() else None
        if isinstance(found, list):
            found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
        if isinstance(found, str):
            return found
    return None


def sampling_defaults(model: Path) -> dict[str, Any]:
    """Ollama's names of what generation_config.json says of sampling."""
    file = model / "generation_config.json"
    said = json.loads(file.read_bytes()) if file.is_file() else {}
    names = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    names["repetition_penalty"] = "repeat_penalty"
    found = {ours: said[theirs] for theirs, ours in names.items() if said.get(theirs) is not None}
    if said.get("do_sample") is False:
        found["temperature"] = 0.0
    return found
