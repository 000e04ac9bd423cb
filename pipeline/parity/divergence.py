"""Metrics of a language model: how far two distributions of the next token are apart, token by token.

Legend: T positions of a sample, V vocabulary, n scored positions, m scored positions whose next token is known.

Everything is computed in float64 from float32 logits, in blocks of positions, so that memory stays bounded whatever
the vocabulary. What each number means, with its unit, is in `pipeline/data/gates.toml`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float64]

_BLOCK = 1 << 21  # elements of float64 a block: 16 MiB an array, a handful of arrays


class Scores(NamedTuple):
    """What one sample says about a candidate; padding is left out of every array."""

    positions: npt.NDArray[np.int64]
    """[n] the scored positions of the sample."""
    kld: Floats
    """[n] KL(reference || candidate) in nats."""
    rank: npt.NDArray[np.int64]
    """[n] how many tokens the candidate holds for likelier than the reference's best one (0 = the same best)."""
    nll_reference: Floats
    """[m] -ln p of the true next token, by the reference."""
    nll: Floats
    """[m] -ln p of the true next token, by the candidate."""
    nonfinite: int
    """How many of the candidate's logits are NaN, +inf, or -inf where the reference is finite."""


def score(reference: Array, candidate: Array, token_ids: Array, mask: Array, start: int = 0) -> Scores:
    """Compare the logits of one sample.

    reference, candidate: [R, V], the logits of the positions `start` ... `start + R - 1`; token_ids, mask: [T], all
    positions of the sample, mask 0 = padding. Position t predicts the token of position t + 1, where there is one that
    is not padding. Raises ValueError when the shapes do not agree.
    """
    if reference.shape != candidate.shape or reference.ndim != 2:
        raise ValueError(f"logits of the reference {reference.shape} and the candidate {candidate.shape} differ")
    if token_ids.shape != mask.shape or token_ids.ndim != 1 or start + len(reference) > len(token_ids):
        raise ValueError(f"{len(reference)} positions from {start} do not fit token ids {token_ids.shape}")
    scored = np.flatnonzero(mask[start : start + len(reference)]).astype(np.int64)
    follows = np.append(mask[1:], 0).astype(bool)
    labels = np.append(token_ids[1:], 0).astype(np.int64)
    klds, nlls_reference, nlls = [np.empty(0)], [np.empty(0)], [np.empty(0)]
    ranks = [np.empty(0, np.int64)]
    nonfinite = 0
    rows = max(1, _BLOCK // reference.shape[1])
    for first in range(0, len(scored), rows):
        block = scored[first : first + rows]
        ref = np.asarray(reference[block], np.float64)
        cand = np.asarray(candidate[block], np.float64)
        nonfinite += int(np.count_nonzero(~np.isfinite(cand) & ~(np.isneginf(cand) & np.isneginf(ref))))
        with np.errstate(all="ignore"):  # what is not finite is counted above and fails every gate
            logp, logq = log_softmax(ref), log_softmax(cand)
            klds.append(_divergence(logp, logq))
            ranks.append(_rank_of_best(logp, logq))
        known = np.flatnonzero(follows[block + start])
        label = labels[block + start][known]
        nlls_reference.append(-logp[known, label])
        nlls.append(-logq[known, label])
    return Scores(
        positions=scored + start,
        kld=np.concatenate(klds),
        rank=np.concatenate(ranks),
        nll_reference=np.concatenate(nlls_reference),
        nll=np.concatenate(nlls),
        nonfinite=nonfinite,
    )


def summarise(samples: Iterable[Scores]) -> dict[str, float]:
    """All samples' metrics by name. One value of the candidate that is not finite makes every metric NaN.

    A metric that the data cannot give (no position scored, no next token known) is left out.
    """
    all_scores = list(samples)
    nonfinite = sum(scores.nonfinite for scores in all_scores)
    kld = np.concatenate([scores.kld for scores in all_scores] or [np.empty(0)])
    rank = np.concatenate([scores.rank for scores in all_scores] or [np.empty(0, np.int64)])
    nll_reference = np.concatenate([scores.nll_reference for scores in all_scores] or [np.empty(0)])
    nll = np.concatenate([scores.nll for scores in all_scores] or [np.empty(0)])
    out: dict[str, Any] = {}
    with np.errstate(all="ignore"):
        if len(kld):
            p50, p99, p999 = np.quantile(kld, (0.5, 0.99, 0.999))
            out.update(kld_mean=kld.mean(), kld_median=p50, kld_p99=p99, kld_p999=p999, kld_max=kld.max())
            out.update(top1=np.mean(rank == 0), top5=np.mean(rank < 5))
        if len(nll):
            ratio = nll - nll_reference
            out.update(perplexity=np.exp(nll.mean()), perplexity_reference=np.exp(nll_reference.mean()))
            out.update(perplexity_ratio=np.exp(ratio.mean()), ln_ppl_ratio_mean=ratio.mean())
            if len(ratio) > 1:
                out["ln_ppl_ratio_stderr"] = ratio.std(ddof=1) / np.sqrt(len(ratio))
            out["rms_delta_p"] = np.sqrt(np.mean((np.exp(-nll) - np.exp(-nll_reference)) ** 2))
    values = {name: float("nan") if nonfinite else float(value) for name, value in out.items()}
    return {**values, "nonfinite": float(nonfinite)}


def greedy(reference: Sequence[Sequence[int]], candidate: Sequence[Sequence[int]]) -> dict[str, float]:
    """Compare greedy continuations, prompt by prompt: the metrics `greedy_*`. No prompts, no metrics.

    Raises ValueError when the candidate answered another number of prompts.
    """
    if len(reference) != len(candidate):
        raise ValueError(f"{len(candidate)} continuations for {len(reference)} prompts")
    if not reference:
        return {}
    prefixes = [equal_prefix(ref, cand) for ref, cand in zip(reference, candidate, strict=True)]
    equal = [list(ref) == list(cand) for ref, cand in zip(reference, candidate, strict=True)]
    return {
        "greedy_prefix_mean": float(np.mean(prefixes)),
        "greedy_prefix_min": float(min(prefixes)),
        "greedy_equal": float(np.mean(equal)),
    }


def equal_prefix(reference: Sequence[int], candidate: Sequence[int]) -> int:
    """How many tokens from the start are the same."""
    pairs = zip(reference, candidate, strict=False)
    return next((i for i, (ref, cand) in enumerate(pairs) if ref != cand), min(len(reference), len(candidate)))


def log_softmax(logits: Floats) -> Floats:
    """ln of the probabilities over the last axis, stable for logits of any size."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _divergence(logp: Floats, logq: Floats) -> Floats:
    """KL(p || q) of each row. A token that p rules out adds nothing; rounding below zero counts as zero."""
    p = np.exp(logp)
    terms = np.where(p > 0, p * (logp - logq), 0.0)
    result: Floats = np.maximum(terms.sum(axis=-1), 0.0)
    return result


def _rank_of_best(logp: Floats, logq: Floats) -> npt.NDArray[np.int64]:
    """The rank that q gives to p's best token; of equal logits the lower token id comes first, as in argmax."""
    best = logp.argmax(axis=-1)[:, None]
    own = np.take_along_axis(logq, best, axis=-1)
    earlier = np.arange(logq.shape[-1])[None, :] < best
    result: npt.NDArray[np.int64] = ((logq > own) | ((logq == own) & earlier)).sum(axis=-1)
    return result
