"""Metrics of language models against closed forms and against torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.parity.divergence import equal_prefix, greedy, log_softmax, score, summarise

ONES = np.ones(8, np.int64)


def logits(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities, np.float64)).astype(np.float32)


def compare(reference: np.ndarray, candidate: np.ndarray, ids: np.ndarray | None = None) -> dict[str, float]:
    ids = np.zeros(len(reference), np.int64) if ids is None else ids
    return summarise([score(reference, candidate, ids, np.ones_like(ids))])


def test_kl_of_known_distributions() -> None:
    p, q = (0.5, 0.25, 0.25), (0.25, 0.25, 0.5)
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))  # = ln(2) / 4
    found = compare(np.stack([logits(*p)] * 4), np.stack([logits(*q)] * 4))
    for name in ("kld_mean", "kld_median", "kld_p99", "kld_p999", "kld_max"):
        assert found[name] == pytest.approx(expected, abs=1e-7)
    assert expected == pytest.approx(math.log(2) / 4)
    assert found["top1"] == 0.0  # the first token is p's best, the third is q's
    assert found["top5"] == 1.0


def test_quantiles_are_of_the_positions() -> None:
    p, worse = logits(0.5, 0.5), logits(0.9, 0.1)
    reference = np.stack([p] * 100)
    candidate = np.stack([p] * 99 + [worse])
    one = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    found = compare(reference, candidate)
    assert found["kld_median"] == pytest.approx(0, abs=1e-12)
    assert found["kld_max"] == pytest.approx(one, rel=1e-6)
    assert found["kld_mean"] == pytest.approx(one / 100, rel=1e-6)
    # Linear interpolation between the 99th and the 100th of 100 values.
    assert found["kld_p99"] == pytest.approx(one * 0.01, rel=1e-5)
    assert found["kld_p999"] == pytest.approx(one * 0.901, rel=1e-5)


def test_perplexity_is_torch_cross_entropy() -> None:
    import torch

    rng = np.random.default_rng(0)
    reference = rng.normal(size=(64, 300)).astype(np.float32) * 5
    candidate = reference + rng.normal(size=reference.shape).astype(np.float32) * 0.3
    ids = rng.integers(0, 300, 64)
    labels = torch.from_numpy(ids[1:])

    def nll(array: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(torch.from_numpy(array[:-1]).double(), labels, reduction="none")

    found = compare(reference, candidate, ids)
    ratio = nll(candidate) - nll(reference)
    assert found["perplexity"] == pytest.approx(float(nll(candidate).mean().exp()), rel=1e-9)
    assert found["perplexity_reference"] == pytest.approx(float(nll(reference).mean().exp()), rel=1e-9)
    assert found["perplexity_ratio"] == pytest.approx(found["perplexity"] / found["perplexity_reference"], rel=1e-9)
    assert found["ln_ppl_ratio_mean"] == pytest.approx(float(ratio.mean()), rel=1e-9)
    assert found["ln_ppl_ratio_stderr"] == pytest.approx(float(ratio.std() / math.sqrt(63)), rel=1e-9)
    delta = (-nll(candidate)).exp() - (-nll(reference)).exp()
    assert found["rms_delta_p"] == pytest.approx(float(delta.square().mean().sqrt()), rel=1e-9)
    kld = torch.nn.functional.kl_div(
        torch.from_numpy(candidate).double().log_softmax(-1),
        torch.from_numpy(reference).double().log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    assert found["kld_mean"] == pytest.approx(float(kld.mean()), rel=1e-9)
    best, five = torch.from_numpy(reference).argmax(-1), torch.from_numpy(candidate).topk(5).indices
    assert found["top1"] == float((five[:, 0] == best).double().mean())
    assert found["top5"] == float((five == best[:, None]).any(-1).double().mean())


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 9),
    st.integers(2, 40),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.sampled_from([-1e4, 0.0, 1e4]),
)
def test_properties(seed: int, rows: int, vocab: int, scale: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    reference = (rng.normal(size=(rows, vocab)) * scale).astype(np.float32)
    ids = rng.integers(0, vocab, rows)
    same = compare(reference, reference, ids)
    assert same["kld_max"] == 0.0
    assert same["top1"] == same["top5"] == 1.0
    assert same.get("perplexity_ratio", 1.0) == 1.0
    # A shift of all logits changes nothing but float32's rounding of the shifted values.
    moved = compare(reference.astype(np.float64), reference.astype(np.float64) + shift, ids)
    assert moved["kld_max"] < 1e-15 + 1e-12 * scale
    other = compare(reference, (rng.normal(size=(rows, vocab)) * scale).astype(np.float32), ids)
    assert other["kld_mean"] >= 0.0
    assert 0.0 <= other["top1"] <= other["top5"] <= 1.0
    assert other["kld_median"] <= other["kld_p99"] <= other["kld_p999"] <= other["kld_max"]


def test_stable_for_huge_logits() -> None:
    found = compare(np.array([[3e4, 0, -3e4]] * 3, np.float32), np.array([[2.9e4, 0, -3e4]] * 3, np.float32))
    assert all(math.isfinite(value) for value in found.values())
    assert found["kld_mean"] == 0.0


def test_padding_is_ignored() -> None:
    rng = np.random.default_rng(1)
    reference, candidate = rng.normal(size=(2, 8, 20)).astype(np.float32)
    ids = rng.integers(0, 20, 8)
    mask = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    broken = candidate.copy()
    broken[:3] = np.nan
    left = score(reference, broken, ids, mask)
    alone = score(reference[3:], candidate[3:], ids[3:], mask[3:])
    assert summarise([left]) == summarise([alone])
    assert left.positions.tolist() == [3, 4, 5, 6, 7]
    assert left.nonfinite == 0
    right = score(reference, candidate, ids, mask[::-1].copy())
    cut = score(reference[:5], candidate[:5], ids[:5], np.ones(5, np.int64))
    assert summarise([right]) == summarise([cut])


def test_rows_from_the_middle_of_a_sample() -> None:
    rng = np.random.default_rng(2)
    reference, candidate = rng.normal(size=(2, 8, 20)).astype(np.float32)
    ids = rng.integers(0, 20, 8)
    whole, last = score(reference, candidate, ids, ONES), score(reference[5:], candidate[5:], ids, ONES, start=5)
    assert np.array_equal(whole.kld[5:], last.kld)
    assert np.array_equal(whole.nll[5:], last.nll)
    assert last.positions.tolist() == [5, 6, 7]
    assert len(last.nll) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_spoils_everything(value: float) -> None:
    rng = np.random.default_rng(3)
    reference = rng.normal(size=(8, 20)).astype(np.float32)
    candidate = reference.copy()
    candidate[6, 11] = value
    found = compare(reference, candidate)
    assert found.pop("nonfinite") == 1.0
    assert found
    assert all(math.isnan(number) for number in found.values())


def test_a_token_that_both_rule_out_is_no_fault() -> None:
    reference = np.array([[1.0, 2.0, -np.inf]] * 2, np.float32)
    found = compare(reference, reference)
    assert found["kld_max"] == 0.0
    assert found["nonfinite"] == 0.0


def test_a_dead_engine_has_no_agreement() -> None:
    rng = np.random.default_rng(4)
    reference = rng.normal(size=(8, 20)).astype(np.float32)
    reference[:, 0] = -9  # otherwise id 0 may be right by chance: of equal logits the lower id comes first
    assert compare(reference, np.zeros_like(reference))["top1"] == 0.0


def test_blocks_give_what_one_pass_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    reference, candidate = rng.normal(size=(2, 8, 20)).astype(np.float32)
    whole = score(reference, candidate, np.arange(8), ONES)
    monkeypatch.setattr("pipeline.parity.divergence._BLOCK", 50)
    for one, other in zip(whole, score(reference, candidate, np.arange(8), ONES), strict=True):
        assert np.array_equal(one, other)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        score(np.zeros((3, 4)), np.zeros((3, 5)), np.zeros(3), np.ones(3))
    with pytest.raises(ValueError, match="do not fit"):
        score(np.zeros((3, 4)), np.zeros((3, 4)), np.zeros(2), np.ones(2))


def test_nothing_scored_gives_no_metric() -> None:
    assert summarise([]) == {"nonfinite": 0.0}
    one = compare(np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32))
    assert "kld_mean" in one
    assert "perplexity" not in one


def test_greedy() -> None:
    found = greedy([[1, 2, 3], [4, 5], [6]], [[1, 2, 9], [4, 5], [6, 7]])
    assert found == {"greedy_prefix_mean": 5 / 3, "greedy_prefix_min": 1.0, "greedy_equal": 1 / 3}
    assert equal_prefix([1, 2], []) == 0
    assert greedy([], []) == {}
    with pytest.raises(ValueError, match="1 continuations for 2"):
        greedy([[1], [2]], [[1]])


def test_log_softmax() -> None:
    assert np.exp(log_softmax(np.array([[1e4, 1e4]]))).tolist() == [[0.5, 0.5]]
