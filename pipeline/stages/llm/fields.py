"""What config.json of a quantized checkpoint has to say, field by field, for engines to read the weights as meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.stages.llm.family import Family, table

_MUST: dict[str, dict[str, tuple[Any, ...]]] = {
    # layout -> path in quantization_config -> the values that are right
    "awq": {"version": ("gemm",), "bits": (4,), "group_size": (128,), "zero_point": (True,)},
    "gptq": {"bits": (4,), "group_size": (128,), "desc_act": (False,), "sym": (True,), "checkpoint_format": ("gptq",)},
    "fp8-block": {"activation_scheme": ("dynamic",), "fmt": ("e4m3",), "weight_block_size": ([128, 128],)},
}
_GROUP: dict[str, dict[str, tuple[Any, ...]]] = {
    # the same within config_groups.group_0 of compressed-tensors
    "w4a16": {
        "format": ("pack-quantized",),
        "weights.num_bits": (4,),
        "weights.type": ("int",),
        "weights.strategy": ("group",),
        "weights.group_size": (32, 128),
        "weights.symmetric": (True, False),
        "weights.dynamic": (False,),
        "weights.actorder": (None, "static"),
        "input_activations": (None,),
        "output_activations": (None,),
    },
    "w8a8": {
        "format": ("int-quantized",),
        "weights.num_bits": (8,),
        "weights.type": ("int",),
        "weights.strategy": ("channel",),
        "weights.symmetric": (True,),
        "input_activations.num_bits": (8,),
        "input_activations.type": ("int",),
        "input_activations.strategy": ("token",),
        "input_activations.dynamic": (True,),
        "input_activations.symmetric": (True,),
    },
    "fp8": {
        "format": ("float-quantized",),
        "weights.num_bits": (8,),
        "weights.type": ("float",),
        "weights.strategy": ("channel",),
        "input_activations.num_bits": (8,),
        "input_activations.type": ("float",),
        "input_activations.strategy": ("token",),
        "input_activations.dynamic": (True,),
    },
}


def config_problems(config: Mapping[str, Any], family: Family, layout: str) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it) of a config.json that announces `layout`."""
    facts = table()["families"][family.model_type]
    if config.get("architectures") != [facts["architecture"]]:
        yield "architectures", f"is {config.get('architectures')!r}, not [{facts['architecture']!r}]"
    if str(config.get("torch_dtype")) not in ("float32", "float16", "bfloat16"):
        yield "torch_dtype", f"is {config.get('torch_dtype')!r}: every engine takes its type from it"
    told = config.get("quantization_config")
    if not told:
        return
    yield from _fields(told, _MUST.get(layout, {}), "quantization_config")
    if layout in _GROUP:
        groups = told.get("config_groups")
        if not isinstance(groups, Mapping) or list(groups) != ["group_0"]:
            yield "quantization_config.config_groups", "must have one group, group_0: TurboMind reads no other"
            return
        yield from _fields(groups["group_0"], _GROUP[layout], "quantization_config.config_groups.group_0")
        if groups["group_0"].get("targets") != ["Linear"]:
            yield "quantization_config.config_groups.group_0.targets", "is not ['Linear']"
        if "lm_head" not in (told.get("ignore") or ()):
            yield "quantization_config.ignore", "does not have lm_head, which is not quantized"
        if told.get("format") != groups["group_0"].get("format"):
            yield "quantization_config.format", "is not that of its group"


def _fields(told: Mapping[str, Any], rules: Mapping[str, tuple[Any, ...]], where: str) -> Iterator[tuple[str, str]]:
    for path, right in rules.items():
        value: Any = told
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        # True equals 1 in Python, and no engine takes one for the other.
        if not any(type(value) is type(choice) and value == choice for choice in right):
            yield f"{where}.{path}", f"is {value!r}; it must be {' or '.join(map(repr, right))}"
