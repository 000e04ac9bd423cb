"""Will it fit, and can its results be written? Asked before anything runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.artifact.package import check_replaceable
from pipeline.cli.console import megabytes
from pipeline.cli.prepare import Prepared
from pipeline.errors import EnginewrightError, RecipeError, StageError, UnavailableError
from pipeline.plan import PlannedStep
from pipeline.store import Store

SHARES = {"fp32": 1.0, "fp16": 0.5, "bf16": 0.5, "int8": 0.28, "fp8": 0.28, "int4": 0.17}
SHARES |= {"F32": 1.0, "F16": 0.5, "BF16": 0.5, "Q8_0": 0.27, "Q6_K": 0.21, "Q5_K_M": 0.18, "Q5_K_S": 0.18}
SHARES |= dict.fromkeys(("Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "IQ4_NL", "MXFP4"), 0.16)
SHARES |= dict.fromkeys(("Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"), 0.13)
"""Size of an engine as a share of the fp32 weights, scales included; then in llama.cpp's types."""
MADE = ("model", "unquantized", "engine")
"""The steps whose results are large."""


def disk(prepared: Prepared, steps: Iterable[PlannedStep]) -> int:
    """Rough need of disk of the steps that will run, bytes: the checkpoint, and every engine."""
    running, plan = {step.key for step in steps}, prepared.plan
    made = {name: [t for t, keys in plan.targets.items() if keys.get(name) in running] for name in MADE}
    weights = sum(file.size for file in prepared.job.sources.model.files)
    config = prepared.job.config
    stored = 2 if "16" in str(config.get("dtype") or config.get("torch_dtype") or "float32") else 4
    precisions = [str(getattr(prepared.recipe.targets[target], "precision", "")) for target in made["engine"]]
    shares = sum(SHARES.get(precision, stored / 4) for precision in precisions)
    # A quantized engine is held against an unquantized one first, where one is not asked for anyway.
    shares += bool(made["unquantized"]) and not {"fp32", "F32"} & set(precisions)
    return weights * bool(made["model"]) + int(weights * 4 // stored * shares)


def too_large(steps: Iterable[PlannedStep], limit_bytes: int) -> UnavailableError | None:
    """The error for the step that needs more memory than there is; 0 bytes: nobody knows."""
    step = max(steps, key=lambda step: step.memory_bytes, default=None)
    if step is None or not limit_bytes or step.memory_bytes <= limit_bytes:
        return None
    return UnavailableError(
        f"this host has {megabytes(limit_bytes)} of memory, and the step {step.label} needs about "
        f"{megabytes(step.memory_bytes)}",
        hint="build on a machine with more memory: the result is the same. If you know better, "
        f"say `--memory {-(-step.memory_bytes // 10**9)}GB`",
    )


def free(path: Path) -> int:
    """Free bytes on the disk of a path that may not exist yet."""
    return shutil.disk_usage(_nearest(path)).free


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _obstacle(folder: Path) -> str:
    """Why no file can be made in a folder that may not exist yet; empty if one can."""
    there = _nearest(folder)
    if not there.is_dir():
        return f"{there} is a file, not a folder"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written"


def problems(
    prepared: Prepared, steps: Iterable[PlannedStep], store: Store, memory_bytes: int
) -> Iterator[EnginewrightError]:
    """What of the steps that will run does not fit on the disk, or in so much memory (0: not asked)."""
    steps = tuple(steps)
    needed = disk(prepared, steps)
    if free(store.root) < needed:
        yield StageError(
            f"no space: {megabytes(free(store.root))} free on the disk of {store.root}, "
            f"the build needs about {megabytes(needed)}",
            hint="free some space (`enginewright cache gc`), or give another place with --cache DIR",
        )
    if error := too_large(steps, memory_bytes):
        yield error


def check(prepared: Prepared, steps: Iterable[PlannedStep], store: Store, memory_bytes: int, out: Path) -> None:
    """Raise the first of `problems`, or what forbids to publish in `out`."""
    for problem in problems(prepared, steps, store, memory_bytes):
        raise problem
    for target in prepared.plan.targets:
        place = out / prepared.recipe.name / target
        writable(place, out, "artifact")
        check_replaceable(place)


def writable(place: Path, out: Path, what: str) -> None:
    """Refuse a place below `out` in whose folder nothing can be made. Raises StageError."""
    if obstacle := _obstacle(place.parent):
        raise StageError(f"no {what} can be written to {out}: {obstacle}", hint="choose another --out")


def report_file(path: Path, option: str) -> None:
    """Refuse a place for a report that cannot be written. Raises RecipeError that names the option."""
    obstacle = f"{path} is a folder" if path.is_dir() else _obstacle(path.parent)
    if not obstacle and path.exists() and not os.access(path, os.W_OK):
        obstacle = f"{path} cannot be written"
    if obstacle:
        raise RecipeError(f"{option}: {obstacle}", hint="give the path of a file that you may write")
