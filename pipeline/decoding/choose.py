"""The choice of the next token from its logits: greedy, or by a seeded draw from what the filters leave.

The order is bias, grammar, repetition penalty, presence and frequency penalty, temperature, top-k, top-p, min-p; each
as transformers defines it, the biases and the two other penalties as OpenAI's API does. Probabilities are float64.

Legend: B rows, V vocabulary, K candidates that are left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.engine import Array, Sampling
from pipeline.errors import StageError

_HEAD = 1024  # how many of the likeliest candidates are sorted before the whole vocabulary is


def log_normalizer(logits_BV: Array) -> Array:
    """ln of the sum of exp(logits) of every row, [B] float64. Raises StageError for logits that are NaN or +inf."""
    top_B = logits_BV.max(axis=-1)
    if not np.isfinite(top_B).all():
        row = int(np.flatnonzero(~np.isfinite(top_B))[0])
        raise StageError(
            f"the engine's logits are not finite (row {row})",
            hint="the precision may be too low for this model: try fp32, and look at the parity report",
        )
    weights_BV = logits_BV - top_B[:, None]
    np.exp(weights_BV, out=weights_BV)
    return np.asarray(np.log(weights_BV.sum(axis=-1, dtype=np.float64)) + top_B)


def penalize(scores_V: Array, seen: Array, penalty: float) -> Array:
    """A copy in which the scores of the tokens `seen` are divided by the penalty, or multiplied where negative."""
    out_V = scores_V.copy()
    scores = out_V[seen]
    out_V[seen] = np.where(scores < 0, scores * penalty, scores / penalty)
    return out_V


class Seen:
    """The tokens that a sequence has, each once."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = dict.fromkeys(ids)

    def add(self, token: int) -> None:
        self._ids[token] = None

    def array(self) -> Array:
        return np.fromiter(self._ids, np.int64, len(self._ids))


class Chooser:
    """Chooses one prompt's tokens. The draw is seeded by the seed and the prompt, so neighbours do not change it."""

    def __init__(self, history: Sequence[int], sampling: Sampling, choice: int = 0) -> None:
        self._sampling = sampling
        self._seen = Seen(history)
        self._rng = np.random.default_rng([sampling.seed, *history, *([choice] if choice else [])])
        self._guide = sampling.guide() if sampling.guide else None
        self._counts: dict[int, int] = {}
        self._bias = tuple(np.array(each) for each in zip(*sampling.logit_bias, strict=True))

    def __call__(self, logits_V: Array) -> int:
        """The next token's id; [V] float logits."""
        if self._bias:
            logits_V = logits_V.copy()
            np.add.at(logits_V, *self._bias)
        if self._guide is not None:
            logits_V = self._guide.allow(logits_V)
        if self._sampling.repetition_penalty != 1.0:
            logits_V = penalize(logits_V, self._seen.array(), self._sampling.repetition_penalty)
        if self._counts and (self._sampling.presence_penalty or self._sampling.frequency_penalty):
            logits_V = self._less_often(logits_V)
        if self._sampling.temperature == 0:
            token = int(logits_V.argmax())
        else:
            ids_K, probabilities_K = distribution(logits_V, self._sampling)
            edges_K = probabilities_K.cumsum()
            place = np.searchsorted(edges_K, self._rng.random() * edges_K[-1], side="right")
            token = int(ids_K[min(int(place), len(ids_K) - 1)])
        self._seen.add(token)
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._guide is not None:
            self._guide.accept(token)
        return token

    def _less_often(self, logits_V: Array) -> Array:
        ids = np.fromiter(self._counts, np.int64, len(self._counts))
        counts = np.fromiter(self._counts.values(), np.float64, len(self._counts))
        out_V = logits_V.copy()
        out_V[ids] -= self._sampling.presence_penalty + self._sampling.frequency_penalty * counts
        return out_V


def likeliest(logits_V: Array, normalizer: float, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens with the model's log probabilities, best first; ties by id."""
    if not count:
        return ()
    count = min(count, len(logits_V))
    best = np.argpartition(-logits_V, count - 1)[:count]
    best = best[np.lexsort((best, -logits_V[best]))]
    return tuple((int(token), float(logits_V[token] - normalizer)) for token in best)


def distribution(logits_V: Array, sampling: Sampling) -> tuple[Array, Array]:
    """What the filters leave: token ids [K] and their probabilities [K] float64, which sum to 1."""
    ids_K = np.arange(len(logits_V))
    if 0 < sampling.top_k < len(logits_V):
        least = np.partition(logits_V, -sampling.top_k)[-sampling.top_k]
        ids_K = np.flatnonzero(logits_V >= least)  # as many as tie with the last one
    scores_K = logits_V[ids_K].astype(np.float64) / sampling.temperature
    weights_K = np.exp(scores_K - scores_K.max())
    weights_K /= weights_K.sum()
    if sampling.top_p < 1:
        kept = _nucleus(weights_K, sampling.top_p)
        ids_K, weights_K = ids_K[kept], weights_K[kept]
    if sampling.min_p > 0:
        kept = weights_K >= sampling.min_p * weights_K.max()
        ids_K, weights_K = ids_K[kept], weights_K[kept]
    return ids_K, weights_K / weights_K.sum()


def _nucleus(weights_K: Array, top_p: float) -> Array:
    """Places of the fewest likeliest candidates whose probabilities sum to `top_p`."""
    places = np.arange(len(weights_K))
    if len(weights_K) > _HEAD:
        head = np.sort(np.argpartition(weights_K, -_HEAD)[-_HEAD:])  # its own order depends on the CPU
        if weights_K[head].sum() > top_p:
            places = head
    order = places[np.argsort(-weights_K[places], kind="stable")]
    before = np.concatenate(([0.0], weights_K[order].cumsum()[:-1]))
    return np.asarray(order[before < top_p])
