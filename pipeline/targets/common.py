"""Steps that every target starts and ends with: fetch, reference, parity, golden."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pipeline.errors import StageError, UnavailableError
from pipeline.recipe import TargetOptions, Task
from pipeline.stages import golden, measure, reference
from pipeline.stages.llm.family import read_family
from pipeline.step import Stage, Step
from pipeline.targets import Job


def fetch_model(job: Job) -> Step:
    """`model`: the checkpoint's files."""
    return job.sources.step("model")


def fetch_data(job: Job, role: str) -> tuple[Step, ...]:
    """`calibration`, `parity-data` or `prompts`: one file, or no step when the recipe names none."""
    return (job.sources.step(role),) if role in job.sources.data else ()


def reference_steps(job: Job) -> tuple[Step, ...]:
    """`reference`: the checkpoint in torch, fp32, on the parity data; with the steps that fetch these."""
    parity = job.recipe.parity
    data = (*fetch_data(job, "parity-data"), *fetch_data(job, "prompts"))
    needs = {"model": "model", **{step.name.removeprefix("parity-"): step.name for step in data}}
    options = reference.ReferenceOptions(
        task=cast(Task, job.task),
        samples=parity.data.samples if parity.data else 8,
        length=parity.data.length if parity.data else 64,
        prompt_count=parity.prompt_count,
        new_tokens=parity.new_tokens,
        seed=parity.seed,
        trust_remote_code=job.recipe.model.trust_remote_code,
        streamed=job.large and _streams(job.config),
    )
    return (*data, Step("reference", reference.STAGE, options, needs))


def compares_unquantized(job: Job, options: TargetOptions) -> bool:
    """Whether the engine is also held against the reference before it is quantized: a large one, if it is asked for."""
    return not job.large or bool(options.unquantized_gates)


def _streams(config: Mapping[str, Any]) -> bool:
    """Whether its layers can be read one at a time: families whose tensors are known, without experts."""
    try:
        return read_family(config).experts == 0
    except (UnavailableError, StageError):
        return False


LOADED = {"int8": 0.6, "int4": 0.4}
"""Share of the fp32 weights that an open engine holds, scales, repacked copies and whole embeddings included."""


def parity_step(
    stage: Stage[Any], opener: str, settings: Mapping[str, Any], *, engine: str = "engine", precision: str = ""
) -> Step:
    """`parity`, or `parity.<engine>`: an engine held against the reference. `precision` says what memory it takes."""
    name = "parity" if engine == "engine" else f"parity.{engine}"
    options = measure.MeasureOptions(opener=opener, settings=dict(settings), share=LOADED.get(precision, 1.0))
    return Step(name, stage, options, {"engine": engine, "reference": "reference"})


def golden_step(job: Job) -> Step:
    """`golden`: the few inputs with which whoever pulls the artifact proves it."""
    return Step(
        "golden", golden.STAGE, golden.GoldenOptions(count=job.recipe.package.golden), {"reference": "reference"}
    )
