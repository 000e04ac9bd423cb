"""Steps that every target starts and ends with: fetch, reference, parity, golden."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.stages import golden, measure, reference
from pipeline.step import Step
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
        task=job.task,
        samples=parity.data.samples if parity.data else 8,
        length=parity.data.length if parity.data else 64,
        prompt_count=parity.prompt_count,
        new_tokens=parity.new_tokens,
        seed=parity.seed,
        trust_remote_code=job.recipe.model.trust_remote_code,
    )
    return (*data, Step("reference", reference.STAGE, options, needs))


def parity_steps(job: Job, opener: str, settings: Mapping[str, Any], *, engine: str = "engine") -> tuple[Step, ...]:
    """`parity`: the engine held against the reference; `golden`: what whoever pulls the artifact proves it with."""
    name = "parity" if engine == "engine" else f"parity.{engine}"
    measured = Step(
        name,
        measure.STAGE,
        measure.MeasureOptions(opener=opener, settings=dict(settings)),
        {"engine": engine, "reference": "reference"},
    )
    if engine != "engine":
        return (measured,)
    kept = Step(
        "golden", golden.STAGE, golden.GoldenOptions(count=job.recipe.package.golden), {"reference": "reference"}
    )
    return (measured, kept)
