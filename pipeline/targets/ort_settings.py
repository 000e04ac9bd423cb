"""How ONNX Runtime is asked to run an engine: its settings, read strictly. Imports nothing that computes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pipeline.errors import RecipeError
from pipeline.frozen import frozen
from pipeline.plain import from_plain, options_of
from pipeline.recipe import option

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
DEVICE = {CPU: "cpu", CUDA: "cuda"}
"""Execution provider -> the device that holds its caches."""


@frozen(kw_only=True)
class Settings:
    """How a session runs. None of it changes what the engine is."""

    threads: int = option(0, "Threads of one operator. 0: every physical core that this process may use.", ge=0)
    provider: str = option(CPU, f"Execution provider: {CPU} or {CUDA}.", pattern=f"{CPU}|{CUDA}")
    device_id: int = option(0, f"Which device, for {CUDA}.", ge=0)
    arena: bool = option(
        False,
        "Keep freed memory in ONNX Runtime's arena. Measured on a 0.5B int4 decoder: 80 MB more, not faster.",
    )


def read_settings(*sources: Mapping[str, Any]) -> Settings:
    """Settings from mappings, the later ones first. Raises RecipeError naming what is unknown or wrong."""
    merged: dict[str, Any] = {}
    for source in sources:
        merged |= source
    known = options_of(Settings)
    try:
        settings = from_plain(Settings, merged)
    except ValueError as error:
        unknown = sorted(set(merged) - {setting.name for setting in known})
        near = difflib.get_close_matches(unknown[0], [setting.name for setting in known], n=1) if unknown else []
        shown = ", ".join(f"{setting.name} ({setting.default()!r})" for setting in known)
        raise RecipeError(
            f"settings of the onnxruntime engine: {error}",
            hint=f"did you mean {near[0]!r}?" if near else f"they are, with their defaults: {shown}",
        ) from error
    if settings.provider not in DEVICE or min(settings.threads, settings.device_id) < 0:
        raise RecipeError(
            f"settings of the onnxruntime engine: {merged} is out of range",
            hint=f"threads and device_id are 0 or more, provider is {CPU} or {CUDA}",
        )
    return settings
