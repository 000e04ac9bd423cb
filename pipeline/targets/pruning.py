"""Put the step `pruned` between the checkpoint and all that reads its weights, whatever the target is.

The reference stays the unpruned model: the gates of an engine show what pruning cost. What is held against the
reference *before quantization*, to find a wrong export, meets one of the pruned model, where nothing may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from pipeline.errors import RecipeError
from pipeline.recipe import TargetOptions, Task
from pipeline.stages import prune
from pipeline.step import Step
from pipeline.targets import Job

PRUNED, REFERENCE = "pruned", "reference.pruned"


def with_pruning(job: Job, options: TargetOptions, steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps of a target, on the pruned checkpoint if the recipe asks for one. RecipeError where that cannot be."""
    if options.prune is None:
        return tuple(steps)
    data = job.recipe.calibration
    method = options.prune.method
    readable = job.kind != "seq2seq" and job.task != "image-classification"
    if method == "wanda" and (data is None or not readable):
        why = "the recipe names none" if readable else f"a model for {job.task} cannot read them here"
        raise RecipeError(
            f"prune.method: wanda judges weights by calibration data, and {why}",
            hint="add a `calibration:` section with `path:`, or use `method: magnitude`",
        )
    if method == "auto":
        method = "wanda" if data is not None and readable else "magnitude"
    wanda = method == "wanda" and data is not None
    told = prune.PruneOptions(
        method=method,
        task=cast(Task, job.task),
        exclude=options.prune.exclude,
        samples=data.samples if wanda and data else 0,
        length=data.length if wanda and data else 0,
        trust_remote_code=job.recipe.model.trust_remote_code,
    )
    needs = {"model": "model", **({"calibration": "calibration"} if wanda else {})}
    first = [job.sources.step(role) for role in needs]
    made = [*first, Step(PRUNED, prune.STAGE, told, needs)]
    for step in steps:
        if step.name in needs:
            continue
        if step.name == "reference":
            made.append(step)
            if any(_structural(each) for each in steps):
                made.append(Step(REFERENCE, step.stage, step.options, {**step.needs, "model": PRUNED}))
            continue
        moved = {"model": PRUNED, **({"reference": REFERENCE} if _structural(step) else {})}
        made.append(replace(step, needs={role: moved.get(name, name) for role, name in step.needs.items()}))
    return tuple(made)


def _structural(step: Step) -> bool:
    """Whether it holds an engine before quantization against the reference."""
    return step.name == "parity.unquantized"
