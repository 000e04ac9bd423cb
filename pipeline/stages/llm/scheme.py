"""How an LLM's weights are stored: layout, group size, method; what config.json says of it. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pipeline.errors import RecipeError
from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.stages.llm.family import Family, table

Layout = Literal["plain", "w4a16", "awq", "gptq", "w8a8", "fp8", "fp8-block"]
Dtype = Literal["fp32", "fp16", "bf16"]
BLOCK = 128
"""Rows and columns of a block of the layout fp8-block."""
TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
SHORT_NAMES = {name: short for short, name in TORCH_NAMES.items()}


@frozen(kw_only=True)
class Scheme:
    """What a quantized checkpoint is, whoever serves it."""

    layout: Layout
    dtype: Dtype
    """Of what is not quantized, and of the scales."""
    method: Literal["none", "rtn", "awq", "gptq", "smoothquant"] = "none"
    group_size: int = 0
    """int4: how many weights of a row share a scale."""
    symmetric: bool = True

    @property
    def bits(self) -> int:
        """Of a weight; 0: not quantized."""
        return {"plain": 0, "w4a16": 4, "awq": 4, "gptq": 4}.get(self.layout, 8)

    @property
    def precision(self) -> str:
        """The name under which gates are looked up."""
        names = {"plain": self.dtype, "w8a8": "int8", "fp8": "fp8", "fp8-block": "fp8"}
        return names.get(self.layout, "int4")

    @property
    def calibrated(self) -> bool:
        """Whether calibration data are read."""
        return self.method in ("awq", "gptq", "smoothquant")


def check(scheme: Scheme, family: Family) -> None:
    """Refuse what the layout or the model's shapes do not allow. Raises RecipeError naming field and number."""
    facts: dict[str, Any] = table()["layouts"][scheme.layout]
    if scheme.method not in facts["methods"]:
        raise RecipeError(
            f"quantize.method: {scheme.method} does not go with layout {scheme.layout}",
            hint=f"one of: {', '.join(facts['methods'])}",
        )
    if scheme.calibrated and not family.calibrates:
        raise RecipeError(
            f"quantize.method: {scheme.method} observes activations, and those of the experts of {family.model_type} "
            "cannot be: transformers runs them as one fused tensor",
            hint="say `method: rtn`",
        )
    if scheme.bits == 4:
        if scheme.group_size not in facts["group_sizes"]:
            raise RecipeError(
                f"quantize.group_size is {scheme.group_size}; layout {scheme.layout} knows "
                f"{', '.join(map(str, facts['group_sizes']))}",
                hint="choose one of them",
            )
        if scheme.symmetric not in facts["symmetric"]:
            raise RecipeError(
                f"quantize.symmetric: {str(scheme.symmetric).lower()} does not go with layout {scheme.layout}",
                hint="leave it out",
            )
    for linear in family.linears if scheme.bits else ():
        _check_shape(scheme, linear.name, linear.out_features, linear.in_features)


def _check_shape(scheme: Scheme, name: str, rows: int, columns: int) -> None:
    if scheme.bits == 4 and (columns % scheme.group_size or rows % 8):
        raise RecipeError(
            f"{name} is [{rows}, {columns}]: {columns} inputs are no whole groups of {scheme.group_size}, "
            "or the outputs no multiple of 8",
            hint="choose a smaller group_size, or another precision",
        )
    if scheme.layout == "fp8-block" and (rows % BLOCK or columns % BLOCK):
        raise RecipeError(
            f"{name} is [{rows}, {columns}], which is not made of whole blocks of {BLOCK} x {BLOCK}",
            hint="say `block: false`, or choose another precision",
        )


def quantization_config(scheme: Scheme, family: Family) -> dict[str, Any] | None:
    """`quantization_config` of config.json; None for plain weights."""
    if scheme.layout == "plain":
        return None
    ignore = ["lm_head", *(["re:.*mlp.gate$", "re:.*block_sparse_moe.gate$"] if family.experts else [])]
    if scheme.layout == "awq":
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": scheme.group_size,
            "zero_point": True,
            "modules_to_not_convert": None if not family.experts else ["gate"],
        }
    if scheme.layout == "gptq":
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": 4,
            "group_size": scheme.group_size,
            "desc_act": False,
            "static_groups": True,
            "sym": True,
            "lm_head": False,
        }
    if scheme.layout == "fp8-block":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": [name for name in ignore if not name.startswith("re:")]
            + (["gate"] if family.experts else []),
        }
    form, weights, activations = _compressed(scheme)
    group = {
        "targets": ["Linear"],
        "format": form,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _compressed(scheme: Scheme) -> tuple[str, Mapping[str, Any], Mapping[str, Any] | None]:
    """Format, weights and input activations of a compressed-tensors group."""
    if scheme.layout == "w4a16":
        weights = _args(4, "int", "group", symmetric=scheme.symmetric) | {"group_size": scheme.group_size}
        if scheme.method == "gptq":
            weights["actorder"] = "static"
        return "pack-quantized", weights, None
    kind, form = ("int", "int-quantized") if scheme.layout == "w8a8" else ("float", "float-quantized")
    return form, _args(8, kind, "channel"), _args(8, kind, "token") | {"dynamic": True}


def _args(bits: int, kind: str, strategy: str, *, symmetric: bool = True) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "dynamic": False}


@frozen(kw_only=True)
class Quantize:
    """How weights are quantized."""

    format: Literal["auto", "compressed-tensors", "awq", "gptq"] = option(
        "auto",
        "int4: how the weights lie on disk. `compressed-tensors` (what `auto` means) serves vLLM on GPU and CPU, "
        "TurboMind and transformers; `awq` is AutoAWQ's gemm form, `gptq` GPTQ's first form.",
    )
    method: Literal["auto", "rtn", "awq", "gptq", "smoothquant"] = option(
        "auto",
        "rtn rounds to nearest and needs no data. awq (int4) scales the channels that matter, gptq (int4) mends each "
        "rounding with the columns that follow, smoothquant (int8) moves outliers from activations to weights; these "
        "read the recipe's `calibration`. `auto`: awq for int4 when there is calibration data, else rtn.",
    )
    group_size: int = option(128, "int4: how many weights of a row share a scale: 32 or 128.", ge=32, le=128)
    symmetric: bool | None = option(
        None, "int4: no zero points. Not given: as the format wants it, and symmetric where it takes both."
    )
    block: bool = option(
        False, "fp8: blocks of 128 x 128 as DeepSeek stores them, instead of a scale for each output channel."
    )
