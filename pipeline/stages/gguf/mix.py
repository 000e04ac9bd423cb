"""Which type every tensor of a GGUF file gets: llama.cpp's own rules, from pipeline/data/gguf_mixes.toml."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipeline.frozen import frozen
from pipeline.stages.gguf.families import Model
from pipeline.tables import table

BLOCKS = {"F32": 1, "F16": 1, "BF16": 1, "Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32}
BLOCKS |= {"IQ4_NL": 32, "MXFP4": 32, "Q2_K": 256, "Q3_K": 256, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256, "IQ4_XS": 256}
"""Type -> how many values of a row share a block."""
_LAYER = re.compile(r"blk\.(\d+)\.")
_CATEGORIES: tuple[tuple[str, str], ...] = (
    ("attn_qkv.weight", "attn_v"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_output.weight", "attn_output"),
    ("ffn_down", "ffn_down"),
)
"""Part of a tensor's name -> what rules call it."""


@frozen
class Choice:
    """What a tensor becomes."""

    type: str
    wanted: str
    """What the rules ask for; another type where a row does not divide by its block."""


def mixes() -> dict[str, Any]:
    """data/gguf_mixes.toml."""
    return table("gguf_mixes")


def labels() -> tuple[str, ...]:
    """The labels of files: F32 ... MXFP4."""
    return tuple(name for name in mixes() if name != "fallback")


def keeps_f32(name: str, dims: int) -> bool:
    """Whether a tensor stays F32 under every label."""
    return dims < 2 or not name.endswith(".weight") or name.endswith(("_norm.weight", "ffn_gate_inp.weight"))


def choose(label: str, model: Model, name: str, shape: Sequence[int], *, tied: bool, important: bool) -> Choice:
    """The type of the tensor `name` of `shape` [..., columns] in a file of `label`.

    `tied`: the file has no output matrix. `important`: an importance matrix is at hand.
    """
    if keeps_f32(name, len(shape)):
        return Choice("F32", "F32")
    mix = mixes()[label]
    default = str(mix["default"])
    if BLOCKS[default] == 1:
        return Choice(default, default)
    wanted = _wanted(mix, default, model, name, shape, tied=tied, important=important)
    return Choice(_fitting(wanted, shape[-1]), wanted)


def _wanted(
    mix: dict[str, Any], default: str, model: Model, name: str, shape: Sequence[int], *, tied: bool, important: bool
) -> str:
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        if "rest" in mix or default == "Q8_0" or shape[-1] % BLOCKS[default]:
            return "Q8_0"
        return "Q6_K"
    if "rest" in mix:
        return default if len(shape) == 3 and shape[0] > 1 else str(mix["rest"])
    category = next((kind for text, kind in _CATEGORIES if text in name), "")
    found = _LAYER.match(name)
    layer = int(found[1]) if found else 0
    wanted = default
    for rule in mix.get("rules", ()):
        if rule["tensor"] == category and _holds(rule.get("when", ""), model, layer, important):
            wanted = str(rule["type"])
            break
    if category == "attn_v" and model.attention_bits and wanted in ("Q3_K", "Q4_K"):
        wanted = "Q5_K"
    if category in ("attn_v", "attn_k") and model.experts == 8:
        wanted = "Q8_0"
    return wanted


def _holds(conditions: str, model: Model, layer: int, important: bool) -> bool:
    layers = model.layers
    truths = {
        "more_bits": layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2,
        "eighth": layer < layers // 8,
        "sixteenth": layer < layers // 16,
        "first2": layer < 2,
        "first4": layer < 4,
        "gqa4": model.heads // model.kv_heads >= 4,
        "experts8": model.experts == 8,
        "dense": model.experts != 8,
        "plain": not important,
        "important": important,
    }
    return all(truths[each] for each in conditions.split())


def _fitting(wanted: str, columns: int) -> str:
    """The type itself if its blocks divide a row, else llama.cpp's substitute."""
    if columns % BLOCKS[wanted] == 0:
        return wanted
    other = str(mixes()["fallback"].get(wanted, "F16"))
    return other if columns % BLOCKS[other] == 0 else "F16"
