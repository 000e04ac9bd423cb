"""RoPE as GGUF says it: keys below the architecture's name, and tensors with a factor for each frequency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.errors import StageError, UnavailableError
from pipeline.frozen import frozen

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
_OPTIONAL = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor"),
}
_FIXED = {"beta_fast": 32.0, "beta_slow": 1.0}
"""Measured: with other values in the keys that other converters write, the mean KL divergence is 1.6."""
_KINDS = ("full_attention", "sliding_attention")


@frozen
class Rope:
    """RoPE of a model's full layers."""

    kind: str
    theta: float
    dims: int
    """How many of a head's dimensions turn."""
    context: int
    """max_position_embeddings."""
    parameters: Mapping[str, Any]


def read_ropes(
    values: Mapping[str, Any], head_dim: int, context: int, kinds: tuple[str, ...], local: bool
) -> tuple[Rope, float]:
    """config.json's fields -> RoPE of the full layers, and the base of the sliding ones (0 where `local` is False).

    Reads the old `rope_theta` and `rope_scaling` and the `rope_parameters` of transformers 5.
    """
    given = values.get("rope_parameters") or {}
    nested = bool(given) and set(given) <= set(_KINDS)
    own = dict((given.get("full_attention") or {}) if nested else given)
    own |= values.get("rope_scaling") or {}
    outer = {"rope_theta": values.get("rope_theta", 10000.0)}
    for field in ("partial_rotary_factor", "original_max_position_embeddings"):
        if values.get(field) is not None:
            outer[field] = values[field]
    rope = _read({**outer, **own}, head_dim, context, kinds)
    if not local:
        return rope, 0.0
    sliding = dict((given.get("sliding_attention") or {}) if nested else {})
    if sliding.get("rope_type", "default") != "default":
        raise UnavailableError(f"the gguf target does not know sliding layers of rope type '{sliding['rope_type']}'")
    return rope, float(sliding.get("rope_theta", values.get("rope_local_base_freq", 10000.0)))


def _read(parameters: dict[str, Any], head_dim: int, context: int, kinds: tuple[str, ...]) -> Rope:
    parameters = {key: value for key, value in parameters.items() if value is not None}
    legacy = parameters.pop("type", "default")
    kind = str(parameters.pop("rope_type", legacy))
    kind = "longrope" if kind == "su" else kind
    if kind not in kinds:
        raise UnavailableError(
            f"the gguf target does not know rope type '{kind}' here", hint=f"known: {', '.join(kinds)}"
        )
    theta, share = float(parameters.pop("rope_theta")), float(parameters.pop("partial_rotary_factor", 1.0))
    original = parameters.pop("original_max_position_embeddings", None)
    if "original_max_position_embeddings" in _FIELDS[kind]:
        parameters["original_max_position_embeddings"] = original or context
    for field in parameters:
        if field not in (*_FIELDS[kind], *_OPTIONAL.get(kind, ())):
            raise UnavailableError(f"the gguf target does not know '{field}' of rope type '{kind}'")
    for field in _FIELDS[kind]:
        if field not in parameters:
            raise StageError(f"config.json: rope type '{kind}' needs '{field}'", hint="download config.json again")
    if parameters.get("truncate") is False:
        raise UnavailableError("llama.cpp's YaRN always rounds its range to whole dimensions (truncate: false)")
    for field, only in _FIXED.items():
        if kind == "yarn" and float(parameters.get(field, only)) != only:
            raise UnavailableError(
                f"llama.cpp's YaRN has {field} {only:g} for this family, and config.json says {parameters[field]}",
                hint="GGUF has a key for it, which llama.cpp does not read here",
            )
    return Rope(kind, theta, int(head_dim * share), context, parameters)


def rope_keys(rope: Rope) -> dict[str, Any]:
    """GGUF keys below the architecture's name, the base excluded."""
    found: dict[str, Any] = {"rope.dimension_count": rope.dims}
    given = rope.parameters
    if rope.kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": float(given["factor"])}
    if rope.kind == "yarn":
        factor = float(given["factor"])
        found["rope.scaling.original_context_length"] = int(given["original_max_position_embeddings"])
        # llama.cpp multiplies its own attention factor, that of mscale 1, by this key.
        attention, usual = _attention_factor(given, factor), _scale(factor, 1.0)
        if abs(attention / usual - 1) > 1e-9:
            found["rope.scaling.attn_factor"] = attention / usual
    if rope.kind == "longrope":
        found["rope.scaling.original_context_length"] = int(given["original_max_position_embeddings"])
        found["rope.scaling.attn_factor"] = _long_attention(rope)
    return found


def _scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _attention_factor(given: Mapping[str, Any], factor: float) -> float:
    if "attention_factor" in given:
        return float(given["attention_factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        return _scale(factor, float(given["mscale"])) / _scale(factor, float(given["mscale_all_dim"]))
    return _scale(factor, 1.0)


def _long_attention(rope: Rope) -> float:
    if "attention_factor" in rope.parameters:
        return float(rope.parameters["attention_factor"])
    original = int(rope.parameters["original_max_position_embeddings"])
    factor = rope.context / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def rope_tensors(rope: Rope) -> dict[str, npt.NDArray[np.float32]]:
    """GGUF name -> factors [dims / 2] float32 by which the frequencies are divided."""
    import numpy as np

    given = rope.parameters
    if rope.kind == "longrope":
        tables = {}
        for name in ("long", "short"):
            factors = np.array(given[f"{name}_factor"], np.float32)
            if factors.shape != (rope.dims // 2,):
                raise StageError(f"config.json: {name}_factor has {factors.size} values, not {rope.dims // 2}")
            tables[f"rope_factors_{name}.weight"] = factors
        return tables
    if rope.kind != "llama3":
        return {}
    # In float32, and a number divided by a tensor as the number times its reciprocal: as torch computes it, so that the
    # factors are those of other converters bit by bit.
    one = np.float32
    exponent = np.arange(0, rope.dims, 2, dtype=np.float32) / one(rope.dims)
    frequencies = one(1.0) / np.power(one(rope.theta), exponent)
    factor, low, high = (float(given[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = int(given["original_max_position_embeddings"])
    found: list[np.float32] = []
    for frequency in frequencies:
        wavelength = one(1) / frequency * one(2 * math.pi)
        if wavelength < original / high:
            found.append(one(1))
        elif wavelength > original / low:
            found.append(one(factor))
        else:
            smooth = (one(1) / wavelength * one(original) - one(low)) / one(high - low)
            found.append(one(1) / ((one(1) - smooth) / one(factor) + smooth))
    return {"rope_freqs.weight": np.array(found, np.float32)}
