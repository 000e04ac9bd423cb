"""The tensors of a decoder by family, from data/llm_servers.toml and config.json: names, shapes, biases, folds.

Imports nothing that computes: planning reads it, the quantizer, and the validator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline import tables
from pipeline.errors import RecipeError, StageError, UnavailableError
from pipeline.frozen import frozen

LAYERS = "model.layers"
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@frozen
class Linear:
    """One matrix product of a layer."""

    name: str
    """Within its layer, `self_attn.q_proj`."""
    out_features: int
    in_features: int
    bias: bool


@frozen
class Fold:
    """Where a scale of the input of the linears `to` is taken out again."""

    source: str
    """A norm, or a linear, of the same layer."""
    to: tuple[str, ...]
    norm: bool


@frozen
class Family:
    """A decoder as its checkpoint stores it."""

    model_type: str
    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    experts: int
    tied: bool
    norm_offset: float
    calibrates: bool
    linears: tuple[Linear, ...]
    """Of every layer, an entry for each expert."""
    others: Mapping[str, tuple[int, ...]]
    """Every other tensor of a layer -> shape; biases are of their linears."""
    folds: tuple[Fold, ...]

    def layer(self, index: int) -> str:
        """`model.layers.3.`: what stands before a name."""
        return f"{LAYERS}.{index}."

    def linear(self, name: str) -> Linear:
        """A linear by its name within a layer."""
        return next(linear for linear in self.linears if linear.name == name)

    def reads(self, name: str) -> str:
        """The first of the linears that read the same input as `name`: what is observed of it holds for all."""
        return next((fold.to[0] for fold in self.folds if name in fold.to), name)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every tensor of the unquantized checkpoint, in the order of the model."""
        yield EMBED, (self.vocab, self.hidden)
        for index in range(self.layers):
            yield from ((self.layer(index) + name, shape) for name, shape in self.others.items())
            for linear in self.linears:
                name = self.layer(index) + linear.name
                yield f"{name}.weight", (linear.out_features, linear.in_features)
                if linear.bias:
                    yield f"{name}.bias", (linear.out_features,)
        yield NORM, (self.hidden,)
        if not self.tied:
            yield HEAD, (self.vocab, self.hidden)


def table() -> dict[str, Any]:
    """data/llm_servers.toml."""
    return tables.table("llm_servers")


def _facts(name: str) -> dict[str, Any]:
    own: dict[str, Any] = table()["families"][name]
    return {**_facts(own["like"]), **own} if "like" in own else own


def read_family(config: Mapping[str, Any]) -> Family:
    """config.json -> Family. UnavailableError for one that the table does not have, StageError for a missing field."""
    model_type = config.get("model_type")
    families = table()["families"]
    if model_type not in families:
        raise UnavailableError(
            f"the LLM quantizer does not know model_type {model_type!r}", hint=f"it knows: {', '.join(families)}"
        )
    facts = _facts(str(model_type))
    if facts["architecture"] not in (config.get("architectures") or [facts["architecture"]]):
        raise UnavailableError(
            f"the LLM quantizer does not know architecture {config['architectures'][0]!r} of model_type {model_type!r}",
            hint=f"it knows {facts['architecture']}",
        )
    if config.get("quantization_config"):
        raise RecipeError("the model is quantized already", hint="start from the unquantized checkpoint")
    return describe(config)


def describe(config: Mapping[str, Any]) -> Family:
    """The same for a config.json that may have a quantization_config, of a model_type that the table has."""
    facts = _facts(str(config["model_type"]))
    for field, wanted in facts.get("must", {}).items():
        if config.get(field, wanted) not in (wanted, None):
            raise UnavailableError(
                f"config.json: {field} is {config[field]!r}; only {wanted!r} is known here",
                hint="leave this model to the onnxruntime target, or open an issue",
            )
    heads = _field(config, "num_attention_heads")
    dims = {"H": _field(config, "hidden_size"), "I": _field(config, "intermediate_size")}
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or dims["H"] // heads)
    dims |= {"Q": heads * head_dim, "KV": kv_heads * head_dim, "D": head_dim, "II": 2 * dims["I"]}
    dims |= {"QKV": dims["Q"] + 2 * dims["KV"], "M": int(config.get("moe_intermediate_size") or 0)}
    experts = 0
    if "experts" in facts:  # transformers 5 writes num_local_experts for every family
        experts = _field(config, facts["experts"] if facts["experts"] in config else "num_local_experts")
    dims["E"] = experts
    tied = config.get("tie_word_embeddings")
    return Family(
        model_type=str(config["model_type"]),
        architecture=facts["architecture"],
        layers=_field(config, "num_hidden_layers"),
        hidden=dims["H"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=_field(config, "vocab_size"),
        context=int(config.get("max_position_embeddings") or 2048),
        experts=experts,
        tied=bool(facts.get("tied", False) if tied is None else tied),
        norm_offset=float(facts.get("norm_offset", 0.0)),
        calibrates=facts["calibrates"],
        linears=tuple(_linears(facts["linears"], dims, config, experts)),
        others={name: tuple(dims[dim] for dim in shape) for name, shape in facts["tensors"].items()},
        folds=tuple(
            Fold(fold["from"], tuple(fold["to"]), norm=fold["from"] not in facts["linears"])
            for fold in facts["folds"]
            if fold.get("when") != "heads" or heads == kv_heads
        ),
    )


def _linears(
    linears: Mapping[str, Any], dims: Mapping[str, int], config: Mapping[str, Any], experts: int
) -> Iterator[Linear]:
    for name, (rows, columns, bias) in linears.items():
        has_bias = bias if isinstance(bias, bool) else bool(config.get(bias, False))
        for each in (name.replace("*", str(number)) for number in range(experts)) if "*" in name else (name,):
            yield Linear(each, dims[rows], dims[columns], has_bias)


def _field(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise StageError(
            f"config.json: {name} is {value!r}, a positive number is expected", hint="download config.json again"
        )
    return value
