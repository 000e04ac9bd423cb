"""Stage `golden`: a few inputs with the reference's outputs that travel with an artifact.

Whoever pulls the artifact proves it with them on their own machine. The size is bounded whatever the vocabulary: the
first samples; of a decoder 64 positions; of outputs with a row for each token the last rows of each sample, as many as
fit into 256 KiB, and four at least.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipeline.engine import Array, Engine
from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.stages.measure import accepted, report
from pipeline.step import Inputs, Progress, Stage

POSITIONS = 64
"""Tokens of a decoder's sample. What a causal model says there does not depend on what follows."""
KEPT = 4
"""Last positions of a sample whose outputs are kept at least, every value of them."""
KEPT_BYTES = 1 << 18
"""More positions are kept while a sample's output stays below this size."""
NAME = "golden.json"

# What says little about an engine below so many positions. Measured: an int4 engine with a top1 of 0.939 on 8192
# positions has 0.883 on 128 of them, on the other side of a gate of 0.90.
_FEW = 256
_NEED_MANY: tuple[str, ...] = (
    "top1",
    "top5",
    "kld_p99",
    "kld_p999",
    "perplexity",
    "perplexity_reference",
    "perplexity_ratio",
)
_NEED_MANY += ("ln_ppl_ratio_mean", "ln_ppl_ratio_stderr", "rms_delta_p")


@frozen(kw_only=True)
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
    from pipeline.parity.stored import Stored, write_json

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
            row_bytes = samples[0][0].nbytes
            kept[name] = max(KEPT, min(POSITIONS, KEPT_BYTES // row_bytes))
            samples = [sample[-kept[name] :] for sample in samples]
        _write(out_dir / f"outputs.{name}.npy", samples)
    info = {**stored.info, "samples": count, "lengths": lengths, "kept": kept}
    write_json(out_dir / NAME, info)
    greedy = stored.greedy()
    if greedy is not None:
        prompts = None if greedy.prompts is None else greedy.prompts[:count]
        document = {"prompts": prompts, "new_tokens": greedy.new_tokens, "tokens": greedy.tokens[:count]}
        write_json(out_dir / "greedy.json", document)


def judge_golden(golden_dir: Path, engine: Engine, accepts: Collection[str] | None = None) -> dict[str, Any]:
    """Run an engine on a golden set: a report as of stage `parity`, with the same names.

    `accepts` names the engine's inputs; by default the engine.json beside the golden folder says. A metric that so few
    positions cannot show is left out of the report: the set proves that the engine answers as it should on this
    machine, and is no measure of its quality.
    """
    from pipeline.parity.judge import judge
    from pipeline.parity.stored import Stored

    stored = Stored.open(golden_dir, NAME)
    found = judge(stored, engine, batch=2, accepts=accepts or accepted(golden_dir.parent))
    if found.rows < _FEW:
        found.metrics = {name: value for name, value in found.metrics.items() if name not in _NEED_MANY}
    return report(stored, found, golden_dir.parent)


def _write(path: Path, samples: list[Array]) -> None:
    import numpy as np

    from pipeline.parity.stored import NpyWriter

    first = samples[0]
    shape = (len(samples), max(len(sample) for sample in samples), *first.shape[1:])
    with NpyWriter(path, shape, np.dtype(first.dtype)) as file:
        for sample in samples:
            file.append(sample)


STAGE = Stage("golden", run, version=1, tools=("numpy",))
