"""Metrics of encoders against closed forms and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.parity.similarity import compare, spearman, summarise


def test_closed_forms() -> None:
    reference = np.array([[3.0, 4.0], [1.0, 0.0]], np.float32)
    candidate = np.array([[3.0, 4.0], [1.0, 1.0]], np.float32)
    found = summarise([compare(reference, candidate)])
    assert found["cosine_min"] == pytest.approx(math.sqrt(0.5))
    assert found["cosine_mean"] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert found["max_abs_error"] == 1.0
    assert found["max_rel_error"] == 1.0
    assert found["top1"] == 1.0  # of equal values the first counts
    assert found["nonfinite"] == 0.0


def test_relative_error_is_by_row() -> None:
    reference = np.array([[100.0, 0.0], [1.0, 0.0]], np.float32)
    assert summarise([compare(reference, reference + 0.5)])["max_rel_error"] == 0.5
    assert summarise([compare(np.zeros((1, 2)), np.zeros((1, 2)))])["max_rel_error"] == 0.0


def test_top1_counts_rows() -> None:
    reference = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    candidate = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert summarise([compare(reference, candidate)])["top1"] == 0.75


def test_axes_before_the_last_are_rows() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 3, 5))
    assert summarise([compare(a, b)]) == summarise([compare(a.reshape(6, 5), b.reshape(6, 5))])
    assert len(compare(a[0, 0], b[0, 0]).cosine) == 1


def test_zero_vectors() -> None:
    assert compare(np.zeros(3), np.zeros(3)).cosine.tolist() == [1.0]
    assert compare(np.zeros(3), np.ones(3)).cosine.tolist() == [0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_value_that_is_not_finite_spoils_everything(value: float) -> None:
    reference = np.ones((4, 3), np.float32)
    candidate = reference.copy()
    candidate[2, 1] = value
    found = summarise([compare(reference, reference), compare(reference, candidate)])
    assert found.pop("nonfinite") == 1.0
    assert found
    assert all(math.isnan(number) for number in found.values())
    assert math.isnan(spearman(reference, candidate) or 0)


def test_spearman_is_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    reference = rng.normal(size=(20, 6)).astype(np.float32)
    candidate = reference + rng.normal(size=reference.shape).astype(np.float32) * 0.5

    def similarities(array: np.ndarray) -> np.ndarray:
        unit = array.astype(np.float64) / np.linalg.norm(array.astype(np.float64), axis=1, keepdims=True)
        return (unit @ unit.T)[np.triu_indices(20, 1)]

    expected = stats.spearmanr(similarities(reference), similarities(candidate)).statistic
    assert spearman(reference, candidate) == pytest.approx(expected, abs=1e-12)
    # Ties: the same vectors again make equal similarities.
    twice, other = np.concatenate([reference[:4]] * 2), np.concatenate([candidate[:4]] * 2)
    found = spearman(np.round(twice), np.round(other))
    assert found is not None
    assert -1 <= found <= 1


def test_spearman_does_not_see_scale_and_needs_three() -> None:
    rng = np.random.default_rng(2)
    reference = rng.normal(size=(5, 4))
    assert spearman(reference, 3 * reference) == pytest.approx(1.0)
    assert spearman(reference[:2], reference[:2]) is None
    assert spearman(np.ones((5, 4)), reference) is None


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        compare(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="N, D"):
        spearman(np.zeros(3), np.zeros(3))


def test_no_rows_no_metrics() -> None:
    assert summarise([]) == {"nonfinite": 0.0}
