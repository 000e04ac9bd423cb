"""Read an encoder's config.json against the table of families; refuse by name what the table does not know."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from pipeline.errors import StageError, UnavailableError
from pipeline.frozen import frozen
from pipeline.stages.onnx.families import Unknown
from pipeline.tables import table

HEADS = {
    "feature-extraction": "",
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "fill-mask": "ForMaskedLM",
}
"""Task -> the ending of its class's name."""
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "tanh")
_OTHER = "use the torch exporter for this model (exporter: torch)"


@frozen
class Encoder:
    """What an encoder computes, whatever the family."""

    family: str
    task: str
    prefix: str
    layers: int
    hidden: int
    heads: int
    activation: str
    epsilon: float
    types: int
    """Kinds of segments: above 1, token_type_ids is an input."""
    pad: int
    """Positions count from behind this token; -1: from zero."""
    names: Mapping[str, str]
    head: Mapping[str, str]
    """Names of the tensors of the task's own part."""


@cache
def families() -> dict[str, dict[str, Any]]:
    """data/encoder_families.toml, what a family has from another filled in."""
    found: dict[str, dict[str, Any]] = {}
    for name, family in table("encoder_families").items():
        found[name] = {**found.get(family.get("same_as", ""), {}), **family}
    return found


def why_not(config: Mapping[str, Any], task: str) -> UnavailableError | None:
    """None when the fused exporter can export this config.json for a task, else the error that says why not."""
    try:
        read_encoder(config, task)
    except UnavailableError as error:
        return error
    except StageError as error:
        return Unknown(error.message, hint=error.hint)
    return None


def read_encoder(config: Mapping[str, Any], task: str) -> Encoder:
    """config.json -> Encoder. UnavailableError names the first field that is not understood, StageError one that is
    missing or of a wrong type."""
    name = config.get("model_type")
    family = families().get(name) if isinstance(name, str) else None
    if family is None:
        raise Unknown(f"the fused exporter does not know model_type '{name}'", hint=_OTHER)
    if task not in HEADS:
        raise Unknown(f"the fused exporter does not know the task {task} of a {name} model", hint=_OTHER)
    if config.get("quantization_config"):
        raise Unknown("config.json has a quantization_config", hint="start from the unquantized checkpoint")
    _refuse_unknown(config, family)
    values = {**family["defaults"], **{key: value for key, value in config.items() if value is not None}}

    def fact(key: str, kind: type[Any]) -> Any:
        value = family[key]
        if isinstance(value, str) and value.startswith("="):
            field = value[1:]
            value = values.get(field)
        good = (int, float) if kind is float else kind
        if not isinstance(value, good) or isinstance(value, bool):
            raise StageError(
                f"config.json: {field} of a {name} model is {value!r}, not of type {kind.__name__}",
                hint="download config.json again",
            )
        return kind(value)

    layers, hidden, heads = fact("layers", int), fact("hidden", int), fact("heads", int)
    if min(layers, hidden, heads) < 1 or hidden % heads:
        raise StageError(
            f"config.json: {layers} layers, a width of {hidden} and {heads} heads: the width must be a multiple of the "
            "heads, and all must be positive"
        )
    activation = fact("activation", str)
    head = dict(family["tasks"].get({"text-classification": "pooled", "fill-mask": "masked"}.get(task, ""), {}))
    if head.get("activation", "").startswith("="):
        head["activation"] = activation
    for each in (activation, head.get("activation", activation)):
        if each not in ACTIVATIONS:
            raise Unknown(f"the fused exporter does not know the activation '{each}'", hint=_OTHER)
    return Encoder(
        family=str(name),
        task=task,
        prefix=family["prefix"],
        layers=layers,
        hidden=hidden,
        heads=heads,
        activation=activation,
        epsilon=fact("epsilon", float),
        types=fact("types", int),
        pad=int(values["pad_token_id"]) if family["positions"] == "behind_padding" else -1,
        names=family["names"],
        head=head,
    )


def _refuse_unknown(config: Mapping[str, Any], family: Mapping[str, Any]) -> None:
    ignored = table("ignored_fields")
    known = {*ignored["fields"], *family["reads"], *family["defaults"]}
    known |= {value[1:] for value in family.values() if isinstance(value, str) and value.startswith("=")}
    known |= {"hidden_dropout_prob", "attention_probs_dropout_prob", "num_labels", "gradient_checkpointing"}
    must: Mapping[str, list[Any]] = family["must"]
    for field, value in config.items():
        if field in must and value is not None and value not in must[field]:
            raise Unknown(f"the fused exporter does not know {field}={value!r} in config.json", hint=_OTHER)
        if value is None or value is False or field in known or field in must:
            continue
        if not field.startswith(tuple(ignored["prefixes"])):
            raise Unknown(f"the fused exporter does not know the field '{field}' of config.json", hint=_OTHER)
