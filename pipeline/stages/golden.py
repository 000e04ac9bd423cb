"""Stage `golden`: a few inputs with the reference's outputs that travel with an artifact.

Whoever pulls the artifact proves it with them on their own machine. The size is bounded whatever the vocabulary: the
first samples; of a decoder 64 positions; of outputs with a row for each token the last four rows of each sample.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.engine import Array, Engine
from pipeline.parity.judge import finite, judge
from pipeline.parity.stored import NpyWriter, Stored, write_json
from pipeline.recipe import option
from pipeline.step import Inputs, Progress, Stage

POSITIONS = 64
"""Tokens of a decoder's sample. What a causal model says there does not depend on what follows."""
KEPT = 4
"""Last positions of a sample whose outputs are kept, every value of them."""
NAME = "golden.json"


@dataclass(frozen=True, kw_only=True)
class GoldenOptions:
    """How much."""

    count: int = option(2, "How many inputs, and how many prompts.", ge=1)


def run(inputs: Inputs, options: GoldenOptions, out: Path, progress: Progress) -> None:
    """Write the golden set of `inputs["reference"]`."""
    write_golden(inputs["reference"], out, options.count)
    progress(1, 1)


def write_golden(reference_dir: Path, out_dir: Path, count: int) -> None:
    """Cut the first `count` samples and prompts (or all, if there are fewer) out of a reference.

    The layout is that of a reference (see parity/stored.py), with `golden.json` in place of `reference.json`.
    """
    stored = Stored.open(reference_dir)
    count = min(count, stored.samples)
    cut = {"decoder": ("input_ids", "attention_mask"), "seq2seq": ("decoder_input_ids",)}.get(stored.kind, ())
    lengths: dict[str, list[int]] = {}
    kept: dict[str, int] = {}

    def length(name: str, sample: int) -> int | None:
        whole = stored.length(name, sample)
        shorter = stored.kind != "encoder" and (name in cut or name == "logits")
        return min(whole, POSITIONS) if whole is not None and shorter else whole

    def note(name: str) -> None:
        if stored.length(name, 0) is not None:
            lengths[name] = [length(name, sample) or 0 for sample in range(count)]

    for name in stored.info["inputs"]:
        note(name)
        samples = [stored.inputs(sample)[name][0][: length(name, sample)] for sample in range(count)]
        _write(out_dir / f"inputs.{name}.npy", samples)
    for name in stored.outputs:
        note(name)
        samples = [stored.output(name, sample)[1][: length(name, sample)] for sample in range(count)]
        if name in lengths and samples[0].ndim > 1:
            kept[name] = KEPT
            samples = [sample[-KEPT:] for sample in samples]
        _write(out_dir / f"outputs.{name}.npy", samples)
    info = {**stored.info, "samples": count, "lengths": lengths, "kept": kept}
    write_json(out_dir / NAME, info)
    greedy = stored.greedy()
    if greedy is not None:
        prompts = None if greedy.prompts is None else greedy.prompts[:count]
        document = {"prompts": prompts, "new_tokens": greedy.new_tokens, "tokens": greedy.tokens[:count]}
        write_json(out_dir / "greedy.json", document)


def judge_golden(
    golden_dir: Path, engine: Engine, accepts: Collection[str] | None = None
) -> dict[str, float | None]:
    """Run an engine on a golden set: the same metric names as the parity report. None where a value is not finite.

    `accepts` names the engine's inputs (`interface.inputs` of engine.json). The numbers come from a few positions: they
    prove that the engine answers as it should on this machine, and are no measure of its quality.
    """
    return finite(judge(Stored.open(golden_dir, NAME), engine, batch=2, accepts=accepts).metrics)


def _write(path: Path, samples: list[Array]) -> None:
    first = samples[0]
    shape = (len(samples), max(len(sample) for sample in samples), *first.shape[1:])
    with NpyWriter(path, shape, np.dtype(first.dtype)) as file:
        for sample in samples:
            file.append(sample)


STAGE = Stage("golden", run, version=1, tools=("numpy",))
