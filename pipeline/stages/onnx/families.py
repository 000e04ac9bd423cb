"""Read a config.json as one of the decoder families that the fused exporter knows, or say which field it does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import StageError, UnavailableError
from pipeline.frozen import frozen
from pipeline.tables import table

_OTHER = "use the torch exporter for this model (exporter: torch)"
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu_new", "gelu", "relu")
_LAYER_TYPES = ("full_attention", "sliding_attention")


@frozen
class Rope:
    """Rotary embedding of one kind of layer: the type, its base, and its scaling parameters as config.json has them."""

    kind: str
    theta: float
    dims: int
    """How many of a head's dimensions turn."""
    scaling: tuple[tuple[str, Any], ...] = ()


@frozen
class Decoder:
    """What a decoder computes, whatever the family: all that the graph builder needs to know."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    epsilon: float
    activation: str
    tied: bool
    windows: tuple[int, ...]
    """Per layer: how many tokens back it sees, itself included; 0 is all."""
    ropes: tuple[Rope, ...]
    """Per layer."""
    packed: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sandwich: bool
    norm_offset: float
    embed_scale: float
    attention_scale: float
    attention_softcap: float
    logit_softcap: float


class Unknown(UnavailableError):  # noqa: N818  an UnavailableError by another name
    """The fused exporter does not know something that config.json says."""


def families() -> dict[str, Any]:
    """data/decoder_families.toml."""
    return table("decoder_families")


def why_not(config: Mapping[str, Any]) -> str | None:
    """None when the fused exporter can export this config.json, else the reason in a sentence."""
    try:
        read_decoder(config)
    except (Unknown, StageError) as error:
        return error.message
    return None


def read_decoder(config: Mapping[str, Any]) -> Decoder:
    """config.json -> Decoder. Raises UnavailableError that names the first field that is not understood, and StageError
    for one that is missing or of a wrong type."""
    known = families()
    name = config.get("model_type")
    family = known.get(name) if isinstance(name, str) and name not in ("common", "rope") else None
    if family is None:
        raise Unknown(f"the fused exporter does not know model_type '{name}'", hint=_OTHER)
    architectures = config.get("architectures") or [family["architecture"]]
    if family["architecture"] not in architectures:
        raise Unknown(f"the fused exporter does not know architecture '{architectures[0]}'", hint=_OTHER)
    if config.get("quantization_config"):
        raise Unknown("config.json has a quantization_config", hint="start from the unquantized checkpoint")
    facts = {**known["common"], **family}
    _refuse_unknown(config, facts)
    values = {**facts.get("defaults", {}), **{key: value for key, value in config.items() if value is not None}}

    def fact(key: str, kind: type[Any]) -> Any:
        value = facts[key]
        if isinstance(value, str) and value.startswith("="):
            field = value[1:]
            if field not in values and field in config:
                value = kind()  # null: switched off
            elif field not in values:
                raise StageError(
                    f"config.json has no '{field}', which a {name} model needs", hint="download config.json again"
                )
            else:
                value = values[field]
        good = (int, float) if kind is float else kind
        if not isinstance(value, good) or (isinstance(value, bool) and kind is not bool):
            raise StageError(
                f"config.json: {facts[key]} of a {name} model is {value!r}, not of type {kind.__name__}".replace(
                    "=", ""
                ),
                hint="download config.json again",
            )
        return kind(value)

    layers, hidden, heads = fact("layers", int), fact("hidden", int), fact("heads", int)
    if min(layers, hidden, heads) < 1:
        raise StageError("config.json: num_hidden_layers, hidden_size and num_attention_heads must be positive")
    head_dim = fact("head_dim", int) or hidden // heads
    kv_heads = fact("kv_heads", int) or heads
    if heads % kv_heads:
        raise StageError(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    activation = fact("activation", str)
    if activation not in _ACTIVATIONS:
        raise Unknown(f"the fused exporter does not know the activation '{activation}'", hint=_OTHER)
    windows = _windows(values, facts, layers, fact("window", int), fact("pattern", int))
    ropes = _ropes(values, facts, head_dim, windows, fact("context", int), fact("local_theta", float))
    scalar = fact("query_scalar", float) or float(head_dim)
    return Decoder(
        family=str(name),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=fact("intermediate", int),
        vocab=fact("vocab", int),
        context=fact("context", int),
        epsilon=fact("epsilon", float),
        activation=activation,
        tied=fact("tied", bool),
        windows=windows,
        ropes=ropes,
        packed=fact("packed", bool),
        qkv_bias=fact("qkv_bias", bool),
        out_bias=fact("out_bias", bool),
        mlp_bias=fact("mlp_bias", bool),
        qk_norm=fact("qk_norm", bool),
        sandwich=fact("sandwich", bool),
        norm_offset=fact("norm_offset", float),
        embed_scale=float(hidden) ** 0.5 if fact("embed_scaled", bool) else 1.0,
        attention_scale=scalar**-0.5,
        attention_softcap=fact("attention_softcap", float),
        logit_softcap=fact("logit_softcap", float),
    )


def _refuse_unknown(config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    ignored = table("ignored_fields")
    known = {*ignored["fields"], *families()["rope"]["fields"], *facts.get("reads", ()), *facts.get("defaults", {})}
    known |= {value[1:] for value in facts.values() if isinstance(value, str) and value.startswith("=")}
    must: Mapping[str, list[Any]] = facts.get("must", {})
    notes = tuple(ignored["prefixes"])
    for field, value in config.items():
        if value is None or value is False or field in known or field.startswith(notes):
            continue
        if field not in must:
            raise Unknown(f"the fused exporter does not know the field '{field}' of config.json", hint=_OTHER)
        if value not in must[field]:
            raise Unknown(f"the fused exporter does not know {field}={value!r} in config.json", hint=_OTHER)


def _windows(
    values: Mapping[str, Any], facts: Mapping[str, Any], layers: int, window: int, pattern: int
) -> tuple[int, ...]:
    kinds = values.get("layer_types") if facts["windowed"] in ("from_layer", "pattern") else None
    if kinds is not None:
        if len(kinds) != layers:
            raise StageError(f"config.json: layer_types has {len(kinds)} entries for {layers} layers")
        for kind in kinds:
            if kind not in _LAYER_TYPES:
                raise Unknown(f"the fused exporter does not know the layer type '{kind}'", hint=_OTHER)
        slides = [kind == "sliding_attention" for kind in kinds]
    elif facts["windowed"] == "from_layer":
        slides = [bool(values["use_sliding_window"]) and i >= values["max_window_layers"] for i in range(layers)]
    elif facts["windowed"] == "pattern":
        slides = [bool((i + 1) % pattern) for i in range(layers)]
    else:
        slides = [facts["windowed"] == "all"] * layers
    if facts["windowed"] == "from_layer" and not values["use_sliding_window"]:
        slides = [False] * layers
    return tuple(window if slide else 0 for slide in slides)


def _ropes(
    values: Mapping[str, Any],
    facts: Mapping[str, Any],
    head_dim: int,
    windows: tuple[int, ...],
    context: int,
    local_theta: float,
) -> tuple[Rope, ...]:
    given = values.get("rope_parameters") or {}
    nested = bool(given) and set(given) <= set(_LAYER_TYPES)
    own = dict(given.get("full_attention") or {}) if nested else dict(given)
    own |= values.get("rope_scaling") or {}
    outer = {"rope_theta": values.get("rope_theta", 10000.0)}
    for field in ("partial_rotary_factor", "original_max_position_embeddings"):
        if field in values:
            outer[field] = values[field]
    full = _rope({**outer, **own}, head_dim, context)
    if not local_theta:
        return (full,) * len(windows)
    local = dict((given.get("sliding_attention") if nested else None) or {})
    sliding = _rope({"rope_theta": local_theta, **local}, head_dim, context)
    return tuple(sliding if window else full for window in windows)


def _rope(parameters: dict[str, Any], head_dim: int, context: int) -> Rope:
    parameters = {key: value for key, value in parameters.items() if value is not None}
    legacy = parameters.pop("type", "default")
    kind = parameters.pop("rope_type", legacy)
    fields = families()["rope"]
    if kind not in fields or kind == "fields":
        raise Unknown(f"the fused exporter does not know the rope type '{kind}'", hint=_OTHER)
    theta = float(parameters.pop("rope_theta"))
    share = float(parameters.pop("partial_rotary_factor", 1.0))
    original = parameters.pop("original_max_position_embeddings", None)
    if "original_max_position_embeddings" in fields[kind]:
        parameters["original_max_position_embeddings"] = original or context
    for field in parameters:
        if field not in fields[kind]:
            raise Unknown(f"the fused exporter does not know '{field}' of rope type '{kind}'", hint=_OTHER)
    missing = [field for field in fields[kind] if field in _NEEDED and field not in parameters]
    if missing:
        raise StageError(f"config.json: rope type '{kind}' needs '{missing[0]}'", hint="download config.json again")
    dims = int(head_dim * share)
    if dims % 16:
        raise Unknown(
            f"the fused exporter cannot turn {dims} dimensions of a head (GroupQueryAttention wants a multiple of 16)",
            hint=_OTHER,
        )
    return Rope(kind, theta, dims, tuple(sorted(parameters.items())))


_NEEDED = ("factor", "low_freq_factor", "high_freq_factor")
