"""Check of padding: the same answers for samples of unequal length in one batch as for each alone.

The engine is held against itself, so that a fault of the attention mask is told apart from a loss of precision.
"""

from __future__ import annotations

import numpy as np

from pipeline.engine import Array
from pipeline.errors import StageError
from pipeline.parity.runner import Runner, output, same_shape
from pipeline.parity.stored import Stored

_PADDED_LENGTH = 64  # tokens of a decoder's longest sample


def padding_gap(stored: Stored, run: Runner, batch: int) -> float:
    """The largest difference between samples that run together, padded, and each alone."""
    alone, together = (_padded_decoder if stored.kind == "decoder" else _padded_right)(stored, batch)
    got = run(together, f"{batch} samples together")
    largest = 0.0
    for row, sample in enumerate(alone):
        single = run(sample, "a sample alone")
        for name in stored.outputs:
            if name not in got:
                continue
            if len(got[name]) != batch:
                raise StageError(
                    f"the engine's '{name}' has {len(got[name])} rows for a batch of {batch}",
                    hint="the export fixed the batch size: report it",
                )
            part, whole = np.asarray(output(single, name)[0], np.float64), np.asarray(got[name][row], np.float64)
            if stored.length(name, 0) is not None:
                whole = whole[-len(part) :] if stored.kind == "decoder" else whole[: len(part)]
            same_shape(whole[None], part.shape, name)
            with np.errstate(all="ignore"):
                gap = np.where(whole == part, 0.0, np.abs(whole - part))
            largest = float(np.maximum(largest, gap.max(initial=0.0)))  # NaN stays NaN
    return largest


_Batches = tuple[list[dict[str, Array]], dict[str, Array]]
"""The samples alone, each a batch of one, and all of them in one padded batch."""


def _padded_decoder(stored: Stored, batch: int) -> _Batches:
    """Starts of samples, each shorter than the one before, padded on the left."""
    longest = min(_PADDED_LENGTH, max(stored.length("input_ids", i) or 0 for i in range(stored.samples)))
    ids, mask = np.zeros((batch, longest), np.int64), np.zeros((batch, longest), np.int64)
    alone = []
    for row in range(batch):
        start = stored.inputs(row % stored.samples)["input_ids"][:, : max(1, longest * (batch - row) // batch)]
        ids[row, longest - start.shape[1] :], mask[row, longest - start.shape[1] :] = start, 1
        alone.append({"input_ids": start, "attention_mask": np.ones_like(start)})
    return alone, {"input_ids": ids, "attention_mask": mask}


def _padded_right(stored: Stored, batch: int) -> _Batches:
    """Whole samples of their own lengths, padded on the right."""
    alone = [stored.inputs(row % stored.samples) for row in range(batch)]
    together = {}
    for name, first in alone[0].items():
        longest = max(sample[name].shape[1] for sample in alone)
        together[name] = np.zeros((batch, longest, *first.shape[2:]), first.dtype)
        for row, sample in enumerate(alone):
            together[name][row, : sample[name].shape[1]] = sample[name][0]
    return alone, together
