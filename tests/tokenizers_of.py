"""Small tokenizers of every kind that GGUF files carry, trained on CPython's documentation."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.stages.gguf.vocab import _pre_tokenizers
from tests.conftest import ROOT

TEXT = ROOT / "recipes" / "data" / "pydoc-calibration.txt"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>"]


@cache
def byte_level(pre: str, size: int = 800) -> str:
    """tokenizer.json of a byte-level BPE whose pre-tokenizer is llama.cpp's `pre`; bos in front."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    entry = next(each for each in _pre_tokenizers() if each["name"] == pre)
    parts: list[Any] = []
    for step in entry["steps"]:
        if step.startswith("split "):
            parts.append(pre_tokenizers.Split(Regex(step[6:]), "isolated"))
        elif step == "digits":
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step == "bytes regex"))
    tokenizer = Tokenizer(models.BPE(ignore_merges=entry.get("ignore_merges", False)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(TEXT)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return str(tokenizer.to_str())


@cache
def sentencepiece(style: str, size: int = 900) -> str:
    """tokenizer.json of a BPE with byte fallback: `llama` puts a space in front of every part of a text between
    special tokens, `mistral` of the first part, `gemma` of none."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train([str(TEXT)], trainers.BpeTrainer(vocab_size=size - 260, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    order = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(learned["vocab"], key=learned["vocab"].get)]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for index, token in enumerate(special)
        ],
        "normalizer": {
            "llama": {"type": "Sequence", "normalizers": [prepend, replace]},
            "gemma": replace,
            "mistral": None,
        }[style],
        "pre_tokenizer": {"llama": None, "gemma": split, "mistral": first}[style],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(order)},
            "merges": learned["merges"],
        },
    }
    return json.dumps(document)


def put(model: Path, tokenizer: str) -> Path:
    """Give a model folder a tokenizer.json, and the names of SPECIAL."""
    (model / "tokenizer.json").write_text(tokenizer, "utf-8")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (model / "tokenizer_config.json").write_text(json.dumps(names), "utf-8")
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    return model
