"""Read a config.json as one of the families that become GGUF, or say which field is not understood.

What a family is stands in pipeline/data/gguf_families.toml. Nothing is guessed: llama.cpp runs a model whose RoPE or
window was left out as well as the right one, and only its answers are wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import RecipeError, StageError, UnavailableError
from pipeline.frozen import frozen
from pipeline.stages.gguf.rope import Rope, read_ropes
from pipeline.tables import table


@frozen
class Model:
    """What a decoder is, whatever the family: all that the writer needs to know."""

    family: str
    arch: str
    """llama.cpp's name of the architecture."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    epsilon: float
    tied: bool
    permute: bool
    norm_offset: float
    layer: tuple[str, ...]
    """The tensors of a layer by their names in the checkpoint, experts excluded."""
    biased: frozenset[str]
    """Those of them that have a bias."""
    router: str
    """The experts' router, empty for a dense model."""
    each: Mapping[str, str]
    """gate, up, down -> an expert's tensor, with `{e}` for its number."""
    experts: int
    experts_used: int
    rope: Rope
    local_theta: float
    """RoPE base of the sliding layers; 0: they turn as the others."""
    keys: tuple[tuple[str, Any], ...]
    """More GGUF keys, below the architecture's name."""
    attention_bits: bool
    """Whether llama.cpp keeps attn_v above four bits (its class of 70B)."""


class Unknown(UnavailableError):  # noqa: N818  an UnavailableError by another name
    """The GGUF writer does not know something that config.json says."""


def families() -> dict[str, Any]:
    """data/gguf_families.toml."""
    return table("gguf_families")


def read_model(config: Mapping[str, Any], context_length: int | None = None) -> Model:
    """config.json -> Model; `context_length` is what the recipe asks for, in tokens.

    Raises UnavailableError that names the first field that is not understood or that llama.cpp cannot do, StageError
    for one that is missing or wrong, RecipeError for a context that the model does not have.
    """
    name = config.get("model_type")
    facts = _facts(config, str(name))
    _refuse_unknown(config, facts)
    # null is not the default: it switches off.
    values = {key: value for key, value in {**facts["defaults"], **config}.items() if value is not None}

    def number(field: str, default: int | None = None) -> int:
        value = values.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise StageError(f"config.json: {field} is {value!r}, not a number above 0", hint="download it again")
        return value

    layers, hidden, heads = number("num_hidden_layers"), number("hidden_size"), number("num_attention_heads")
    head_dim = number("head_dim", hidden // heads)
    kv_heads = number("num_key_value_heads", heads)
    if heads % kv_heads:
        raise StageError(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    moe = facts.get("moe")
    whole = number("max_position_embeddings")
    context = context_length or whole
    if context > whole:
        raise RecipeError(
            f"context_length is {context}, but the model's max_position_embeddings is {whole}",
            hint=f"ask for at most {whole}",
        )
    _check_window(values, facts, layers, context)
    _check_scale(values, facts, layers, hidden, heads, head_dim)
    rope, local = read_ropes(values, head_dim, whole, tuple(facts["ropes"]), facts["window"] == 6)
    biased = (tensor for tensor, says in facts["biased"].items() if says is True or values.get(says))
    counted = {number(name) for name in moe["experts"] if name in config} if moe else {0}
    if len(counted) != 1:
        raise StageError(f"config.json says the number of experts {sorted(counted)}", hint="download it again")
    (experts,) = counted
    epsilon = values.get("rms_norm_eps")
    if not isinstance(epsilon, float):
        raise StageError(f"config.json: rms_norm_eps is {epsilon!r}, not a number", hint="download it again")
    tied = bool(values.get("tie_word_embeddings", facts.get("tied", False)))
    if facts.get("tied") and not tied:
        raise Unknown(f"llama.cpp has no output matrix for a {name}, and config.json says tie_word_embeddings: false")
    return Model(
        family=str(name),
        arch=facts["arch"],
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=number(moe["size"]) if moe else number("intermediate_size"),
        vocab=number("vocab_size"),
        context=context,
        epsilon=epsilon,
        tied=tied,
        permute=facts["permute"],
        norm_offset=facts["norm_offset"],
        layer=(*facts["layer"], *(() if moe else facts["dense"])),
        biased=frozenset(biased),
        router=moe["router"] if moe else "",
        each=moe["each"] if moe else {},
        experts=experts,
        experts_used=number(moe["used"]) if moe else 0,
        rope=rope,
        local_theta=local,
        keys=tuple(
            (key, float(values[field]) if "softcapping" in key else int(values[field]))
            for field, key in facts["keys"].items()
            if values.get(field)
        ),
        attention_bits=any(
            rule["layers"] == layers
            and (not rule["gqa"] or heads != kv_heads)
            and rule.get("experts_not", -1) != experts
            for rule in facts["big"]
        ),
    )


def _facts(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = families()
    family = table.get(name) if name != "common" else None
    known = ", ".join(each for each in table if each != "common")
    if family is None:
        raise Unknown(f"the gguf target does not know model_type '{name}'", hint=f"it knows {known}")
    architectures = config.get("architectures") or [family["architecture"]]
    if family["architecture"] not in architectures:
        raise Unknown(
            f"the gguf target does not know architecture '{architectures[0]}'",
            hint=f"it knows {family['architecture']}",
        )
    if config.get("quantization_config"):
        raise Unknown("config.json has a quantization_config", hint="start from the unquantized checkpoint")
    common = table["common"]
    return {**common, **family, "reads": [*common["reads"], *family.get("reads", ())]}


def _refuse_unknown(config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    ignored, moe = table("ignored_fields"), facts.get("moe") or {}
    known = {*ignored["fields"], *facts["reads"], *facts["keys"], *facts["defaults"], "sliding_window"}
    known |= {says for says in facts["biased"].values() if isinstance(says, str)}
    known |= {moe["used"], moe["size"], *moe["experts"]} if moe else set()
    for field, value in config.items():
        if field in facts["must"] and value is not None:
            if value not in facts["must"][field]:
                raise Unknown(
                    f"the gguf target does not know {field}={value!r} in config.json of a {config['model_type']}",
                    hint="llama.cpp would run it as another model",
                )
        elif not (value is None or value is False or field in known or field.startswith(tuple(ignored["prefixes"]))):
            raise Unknown(
                f"the gguf target does not know the field '{field}' of config.json",
                hint="what it changes is not known to be in llama.cpp: another runtime may build this model",
            )
    for field, allowed in facts["must"].items():
        # A default of transformers that llama.cpp does not have counts as if it were written.
        if config.get(field) is None and facts["defaults"].get(field, allowed and allowed[0]) not in [*allowed, []]:
            raise Unknown(f"the gguf target does not know {field}={facts['defaults'][field]!r}, the default here")


def _check_window(values: Mapping[str, Any], facts: Mapping[str, Any], layers: int, context: int) -> None:
    """Refuse sliding windows that llama.cpp would not apply."""
    window = values.get("sliding_window")
    every = facts["window"]
    kinds = values.get("layer_types")
    if every != "none":
        every = values.get("sliding_window_pattern", every)
        slides = (
            [kind == "sliding_attention" for kind in kinds] if kinds else [bool((i + 1) % every) for i in range(layers)]
        )
        if slides != [bool((i + 1) % facts["window"]) for i in range(layers)]:
            raise Unknown(
                f"config.json: the sliding layers are not all but every {facts['window']}th, as llama.cpp has them",
                hint="layer_types or sliding_window_pattern of config.json says so",
            )
        return
    slides_at_all = "sliding_attention" in kinds if kinds else True
    if "use_sliding_window" in facts["reads"] and not values.get("use_sliding_window"):
        slides_at_all = False
    if window and slides_at_all and window < context:
        raise Unknown(
            f"llama.cpp has no sliding window for a {values['model_type']}, and this model's is {window} tokens",
            hint=f"say `context_length: {window}` in the target: up to there the two are equal",
        )


def _check_scale(
    values: Mapping[str, Any], facts: Mapping[str, Any], layers: int, hidden: int, heads: int, head_dim: int
) -> None:
    """Gemma's attention scale is no key of GGUF: llama.cpp tells it from the number of layers."""
    if "query_pre_attn_scalar" not in facts["reads"]:
        return
    scalar = hidden // heads if layers in facts["wide"] else head_dim
    if values["query_pre_attn_scalar"] != scalar:
        raise Unknown(
            f"config.json: query_pre_attn_scalar is {values['query_pre_attn_scalar']}, and llama.cpp takes {scalar}",
            hint="GGUF has no key for it",
        )
