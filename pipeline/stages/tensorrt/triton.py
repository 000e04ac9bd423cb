"""config.pbtxt of Triton Inference Server: the artifact's folder is a model of a model repository.

The artifact holds `config.pbtxt` and the plans under `1/`; a folder of artifacts is a repository. The configuration is
made from the network that was compiled and is checked against it: names, types, shapes and the batch dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import StageError
from pipeline.stages.tensorrt.build import Profile
from pipeline.stages.tensorrt.flavours import Flavour

VERSION = "1"
TYPES = {
    "FLOAT": "TYPE_FP32",
    "HALF": "TYPE_FP16",
    "BF16": "TYPE_BF16",
    "INT8": "TYPE_INT8",
    "INT32": "TYPE_INT32",
    "INT64": "TYPE_INT64",
    "UINT8": "TYPE_UINT8",
    "BOOL": "TYPE_BOOL",
}
"""TensorRT's type -> Triton's."""


def config(
    flavour: Flavour, network: Mapping[str, Any], profiles: Sequence[Profile], plans: Mapping[str, str], default: str
) -> str:
    """The text of config.pbtxt. `plans` maps a compute capability to the plan that serves it."""
    batch = max(high[0] for profile in profiles for _, _, high in profile.values())
    lines = []
    if flavour.name == "tensorrt-rtx":
        lines += [
            "# A plan of TensorRT-RTX: it is served by a TensorRT backend that was built on TensorRT-RTX.",
            "# The backend of Triton's own images is built on TensorRT and refuses it.",
        ]
    lines += ['platform: "tensorrt_plan"', f"max_batch_size: {batch}"]
    for kind in ("inputs", "outputs"):
        lines += [_port(kind.removesuffix("s"), tensor) for tensor in network[kind]]
    lines += [f'default_model_filename: "{default}"']
    for capability, plan in plans.items():
        lines.append(f'cc_model_filenames {{ key: "{capability}" value: "{plan}" }}')
    names = ", ".join(f'"{index}"' for index in range(len(profiles)))
    lines.append(f"instance_group [ {{ count: 1 kind: KIND_GPU profile: [ {names} ] }} ]")
    text = "\n".join(lines) + "\n"
    check(text, network, plans)
    return text


def _port(kind: str, tensor: Mapping[str, Any]) -> str:
    if tensor["dtype"] not in TYPES:
        raise StageError(f"Triton has no type for {tensor['dtype']} of '{tensor['name']}'", hint="this is a bug")
    if not tensor["shape"] or tensor["shape"][0] != -1:
        raise StageError(f"'{tensor['name']}' {tensor['shape']} has no batch dimension in front", hint="this is a bug")
    dims = list(tensor["shape"][1:])
    # Triton wants a dimension at least: one number a row is declared [1] and reshaped away.
    shape = f" dims: [ {', '.join(map(str, dims))} ]" if dims else " dims: [ 1 ] reshape: { shape: [ ] }"
    return f'{kind} {{ name: "{tensor["name"]}" data_type: {TYPES[tensor["dtype"]]}{shape} }}'


def check(text: str, network: Mapping[str, Any], plans: Mapping[str, str]) -> None:
    """Hold a config.pbtxt against the engine's inputs and outputs and its plans. StageError names the difference."""
    said = read(text)
    for kind in ("input", "output"):
        engine = {
            tensor["name"]: (TYPES.get(tensor["dtype"]), list(tensor["shape"][1:]) or [1])
            for tensor in network[f"{kind}s"]
        }
        told = {port["name"]: (port["data_type"], port["dims"]) for port in said[kind]}
        if told != engine:
            wrong = sorted(name for name in {*told, *engine} if told.get(name) != engine.get(name))
            raise StageError(
                f"config.pbtxt: {kind} '{wrong[0]}' is {told.get(wrong[0])}, the engine's is {engine.get(wrong[0])}",
                hint="build it again",
            )
    if said["cc_model_filenames"] != dict(plans):
        raise StageError(f"config.pbtxt names the plans {said['cc_model_filenames']}, and the engine has {dict(plans)}")


def read(text: str) -> dict[str, Any]:
    """The fields of a config.pbtxt of ours: input and output as lists, cc_model_filenames as a dictionary."""
    words = _words(text)
    found: dict[str, Any] = {"input": [], "output": [], "cc_model_filenames": {}}
    fields = _message(words)
    for name, value in fields:
        if name in ("input", "output"):
            port = dict(value)
            found[name].append({**port, "dims": [int(size) for size in port["dims"]]})
        elif name == "cc_model_filenames":
            pair = dict(value)
            found[name][pair["key"]] = pair["value"]
        else:
            found[name] = value
    return found


def _words(text: str) -> list[str]:
    import re

    code = "\n".join(line.partition("#")[0] for line in text.splitlines())
    return re.findall(r'"[^"]*"|[\w.+-]+|[{}\[\]:,]', code)


def _message(words: list[str]) -> list[tuple[str, Any]]:
    """Fields until the closing brace; takes the words that it reads off the list."""
    found = []
    while words and words[0] != "}":
        name = words.pop(0)
        if words[0] == ":":
            words.pop(0)
        found.append((name, _value(words)))
    if words:
        words.pop(0)
    return found


def _value(words: list[str]) -> Any:
    word = words.pop(0)
    if word == "{":
        return _message(words)
    if word == "[":
        items = []
        while words[0] != "]":
            if words[0] == ",":
                words.pop(0)
            else:
                items.append(_value(words))
        words.pop(0)
        return items
    return word.strip('"')
