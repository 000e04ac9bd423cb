"""How OpenVINO is asked to run an engine: read strictly, written into engine.json. Imports nothing that computes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pipeline.errors import RecipeError
from pipeline.frozen import frozen
from pipeline.plain import from_plain, options_of
from pipeline.recipe import option

Execution = Literal["f32", "bf16", "f16"]
KvCache = Literal["f32", "f16", "bf16", "u8"]
NATIVE: Mapping[str, tuple[str, ...]] = {
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "f16": ("avx512_fp16", "fp16"),
}
"""Execution precision -> CPU features, any of which computes in it. On another CPU OpenVINO takes the hint and runs f32
without a word (measured, 2026.4.1 on AVX2), so here it is decided beforehand."""


@frozen(kw_only=True)
class Settings:
    """What decides an engine's numbers and speed, beside its weights. OpenVINO's own defaults depend on the CPU and are
    never used."""

    device: Literal["CPU", "GPU", "NPU"] = option("CPU", "OpenVINO's name of the device.")
    execution: Execution = option("f32", "Type of what flows between products (INFERENCE_PRECISION_HINT).")
    kv_cache: KvCache = option("f32", "Type of the cache of a decoder (KV_CACHE_PRECISION).")
    dynamic_quantization: int = option(
        0, "Activations of compressed products in int8, in blocks of this size; 0: no.", ge=0
    )
    threads: int = option(0, "Threads of one engine. 0: every physical core that this process may use.", ge=0)


PLAIN: Mapping[str, Any] = {"execution": "f32", "kv_cache": "f32", "dynamic_quantization": 0}
"""Settings with which an engine computes in fp32 what its weights say: tells faults of conversion from precision."""


def computes_in(isa: tuple[str, ...], execution: str) -> bool:
    """Whether a CPU with these features executes in this precision, natively."""
    return execution == "f32" or any(feature in isa for feature in NATIVE[execution])


def properties(settings: Settings, *, decoder: bool) -> dict[str, str]:
    """Settings as OpenVINO's properties, for compile_model and import_model."""
    found: dict[str, str] = {"INFERENCE_PRECISION_HINT": settings.execution}
    if settings.device == "CPU":
        found["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(settings.dynamic_quantization)
        if settings.threads:
            found["INFERENCE_NUM_THREADS"] = str(settings.threads)
    if decoder:
        found["KV_CACHE_PRECISION"] = settings.kv_cache
    return found


def read_settings(*sources: Mapping[str, Any]) -> Settings:
    """Settings from mappings, the later ones over the earlier. Raises RecipeError naming what is unknown or wrong."""
    merged: dict[str, Any] = {}
    for source in sources:
        merged |= source
    names = [each.name for each in options_of(Settings)]
    try:
        settings = from_plain(Settings, merged)
    except ValueError as error:
        unknown = sorted(set(merged) - set(names))
        near = difflib.get_close_matches(unknown[0], names, n=1) if unknown else []
        raise RecipeError(
            f"settings of the openvino engine: {error}",
            hint=f"did you mean {near[0]!r}?" if near else f"they are: {', '.join(names)}",
        ) from error
    if min(settings.threads, settings.dynamic_quantization) < 0:
        raise RecipeError(f"settings of the openvino engine: {merged} is out of range", hint="numbers are 0 or more")
    return settings
