"""Metrics of an encoder: how far two sets of vectors are apart, row by row.

Legend: R rows (tokens or samples), D values of a row, N samples.

What each number means, with its unit, is in `pipeline/data/gates.toml`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float64]

PAIRWISE_LIMIT = 512
"""How many samples enter `spearman`: the pairs grow with the square."""


class Rows(NamedTuple):
    """What one output of one sample says about a candidate."""

    cosine: Floats
    """[R] cosine of the angle between the two rows."""
    abs_error: Floats
    """[R] largest difference in a row."""
    rel_error: Floats
    """[R] the same over the largest magnitude in the reference's row."""
    same_best: npt.NDArray[np.bool_]
    """[R] whether the largest value is at the same place."""
    nonfinite: int
    """How many of the candidate's values are NaN or infinite."""


def compare(reference: Array, candidate: Array) -> Rows:
    """Compare two arrays of equal shape [..., D] row by row. Padding is the caller's to cut off.

    Raises ValueError when the shapes differ.
    """
    if reference.shape != candidate.shape or reference.ndim == 0:
        raise ValueError(f"reference {reference.shape} and candidate {candidate.shape} differ")
    ref = np.asarray(reference, np.float64).reshape(-1, reference.shape[-1])
    cand = np.asarray(candidate, np.float64).reshape(ref.shape)
    nonfinite = int(np.count_nonzero(~np.isfinite(cand)))
    with np.errstate(all="ignore"):  # what is not finite is counted and fails every gate
        abs_error = np.abs(ref - cand).max(axis=-1)
        scale = np.abs(ref).max(axis=-1)
        rel_error = np.where(abs_error == 0, 0.0, abs_error / scale)
        return Rows(cosine(ref, cand), abs_error, rel_error, ref.argmax(-1) == cand.argmax(-1), nonfinite)


def summarise(parts: Iterable[Rows]) -> dict[str, float]:
    """All rows' metrics by name; none when there is no row. One value that is not finite makes every metric NaN."""
    rows = list(parts)
    nonfinite = sum(part.nonfinite for part in rows)
    if not any(len(part.cosine) for part in rows):
        return {"nonfinite": float(nonfinite)}
    cosines = np.concatenate([part.cosine for part in rows])
    values = {
        "cosine_mean": float(cosines.mean()),
        "cosine_min": float(cosines.min()),
        "max_abs_error": float(max(part.abs_error.max(initial=0) for part in rows)),
        "max_rel_error": float(max(part.rel_error.max(initial=0) for part in rows)),
        "top1": float(np.concatenate([part.same_best for part in rows]).mean()),
    }
    if nonfinite:
        values = dict.fromkeys(values, float("nan"))
    return {**values, "nonfinite": float(nonfinite)}


def spearman(reference: Array, candidate: Array) -> float | None:
    """Rank correlation of all pairwise cosine similarities of N embeddings [N, D]: whether the neighbours stay.

    Only the first `PAIRWISE_LIMIT` samples enter. None below three samples or where all similarities are equal.
    """
    if reference.shape != candidate.shape or reference.ndim != 2:
        raise ValueError(f"embeddings of shape [N, D] expected, got {reference.shape} and {candidate.shape}")
    count = min(len(reference), PAIRWISE_LIMIT)
    if count < 3:
        return None
    if not np.isfinite(np.asarray(candidate[:count], np.float64)).all():
        return float("nan")
    pairs = np.triu_indices(count, 1)
    ranks = [_ranks(_similarities(array[:count])[pairs]) for array in (reference, candidate)]
    x, y = (rank - rank.mean() for rank in ranks)
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm > 0 else None


def cosine(a: Floats, b: Floats) -> Floats:
    """Cosine of each pair of rows [R, D]: two rows of zeros are alike (1), a zero row and another are not (0)."""
    norm_a, norm_b = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    dot = np.einsum("rd,rd->r", a, b)
    with np.errstate(all="ignore"):
        ratio = dot / (norm_a * norm_b)
    empty = (norm_a == 0) | (norm_b == 0)
    alike = ((norm_a == 0) & (norm_b == 0)).astype(np.float64)
    result: Floats = np.clip(np.where(empty, alike, ratio), -1.0, 1.0)
    return result


def _similarities(vectors: Array) -> Floats:
    unit = np.asarray(vectors, np.float64)
    norm = np.linalg.norm(unit, axis=-1, keepdims=True)
    unit = np.divide(unit, norm, out=np.zeros_like(unit), where=norm > 0)
    result: Floats = unit @ unit.T
    return result


def _ranks(values: Floats) -> Floats:
    """Ranks from 0; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    result: Floats = (last - (counts + 1) / 2)[inverse]
    return result
