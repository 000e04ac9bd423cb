"""Stage onnx.optimum: export a model by Optimum, which knows many architectures, in a toolchain of its own."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.recipe import Task


@dataclass(frozen=True, kw_only=True)
class OptimumOptions:
    """What the exporter can be asked for."""

    task: Task | None = None
    """Inferred from config.json when None."""
