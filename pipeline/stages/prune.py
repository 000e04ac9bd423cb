"""Stage prune: of every four neighbouring weights of a product, set the two to zero that matter least (2:4 sparsity).

What comes out is the checkpoint again, file by file, with zeros in it: whatever reads a checkpoint can read it.
NVIDIA's sparse tensor cores skip such zeros; other runtimes gain nothing in speed. The reference stays the unpruned
model, so that parity shows what the zeros cost.

Wanda (Sun and others, 2023) judges a weight by its size times the norm of the activations that it meets, which one pass
over the calibration data measures; magnitude judges by the size alone and needs no data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipeline.frozen import frozen
from pipeline.recipe import Task, option
from pipeline.size import holding
from pipeline.step import Inputs, Progress, Stage


@frozen(kw_only=True)
class PruneOptions:
    """What is set to zero."""

    method: Literal["wanda", "magnitude"]
    task: Task
    exclude: tuple[str, ...] = ()
    samples: int = option(0, "Calibration samples of Wanda.", ge=0)
    length: int = option(0, "Where a calibration sample is cut.", unit="tokens", ge=0)
    trust_remote_code: bool = False


def run(inputs: Inputs, options: PruneOptions, out: Path, progress: Progress) -> None:
    """inputs: model, and calibration for Wanda. Writes the model folder with pruned weights.

    RecipeError where `exclude` matches nothing or no product can be pruned.
    """
    from pipeline.stages.prune_weights import prune

    prune(inputs, options, out, progress)


STAGE = Stage(
    "prune", run, version=1, tools=("torch", "transformers", "numpy"), memory=holding(450, largest=1.5, layer=3)
)
