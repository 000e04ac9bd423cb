"""Beam search over one prompt: scores in, which beams go on with which token out.

Gives what transformers' generate(num_beams=n, do_sample=False) gives: the score of a finished sequence is its log
probability divided by length ** length_penalty, and the search ends when the best running beam, at its present length,
cannot beat the worst of n finished ones (early_stopping=False).

Legend: n beams, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.decoding.choose import penalize
from pipeline.engine import Array, Sampling
from pipeline.frozen import frozen


@frozen
class _Beam:
    """A sequence: its score, its new tokens and the model's log probability of each."""

    score: float
    tokens: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()


class BeamSearch:
    """The beams of one prompt. `advance` until `done`, then `best`."""

    def __init__(self, history: Sequence[int], sampling: Sampling, limit: int, eos: frozenset[int]) -> None:
        self._history = tuple(history)
        self._width = sampling.beams
        self._length_penalty = sampling.length_penalty
        self._penalty = sampling.repetition_penalty
        self._limit = limit
        self._eos = eos
        self._running = [_Beam(0.0)]
        self._finished: list[_Beam] = []
        self.done = False

    def advance(self, log_probs_nV: Array) -> tuple[list[int], list[int]]:
        """Take the next token's log probabilities of every running beam.

        Returns for each beam that goes on the place of its parent and its new token.
        """
        candidates = self._candidates(log_probs_nV)
        length = len(candidates[0][1].tokens)
        at_limit = length == self._limit
        going = []
        for rank, (parent, beam) in enumerate(candidates):
            if not at_limit and beam.tokens[-1] not in self._eos:
                going.append((parent, beam))
            elif rank < self._width:  # a lower candidate is there only to take the place of those that ended
                score = beam.score / length**self._length_penalty
                self._finished.append(_Beam(score, beam.tokens, beam.log_probs))
        self._finished = sorted(self._finished, key=lambda beam: -beam.score)[: self._width]
        going = going[: self._width]
        self._running = [beam for _, beam in going]
        self.done = not going or not self._can_improve(length)
        return [parent for parent, _ in going], [beam.tokens[-1] for _, beam in going]

    def best(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The new tokens of the best sequence, and the model's log probability of each."""
        return self._finished[0].tokens, self._finished[0].log_probs

    def _candidates(self, log_probs_nV: Array) -> list[tuple[int, _Beam]]:
        """The best continuations of all beams, best first: enough that `width` of them do not end."""
        vocabulary = log_probs_nV.shape[1]
        scores_nV = np.asarray(log_probs_nV, np.float64)
        if self._penalty != 1.0:
            seen = [np.unique(self._history + beam.tokens) for beam in self._running]
            scores_nV = np.stack([penalize(s, ids, self._penalty) for s, ids in zip(scores_nV, seen, strict=True)])
        scores = (scores_nV + np.array([beam.score for beam in self._running])[:, None]).ravel()
        count = min(len(scores), max(2, 1 + len(self._eos)) * self._width)
        top = np.argpartition(-scores, count - 1)[:count]
        found = []
        for place in top[np.lexsort((top, -scores[top]))]:
            parent, token = divmod(int(place), vocabulary)
            old = self._running[parent]
            log_prob = float(log_probs_nV[parent, token])
            found.append((parent, _Beam(float(scores[place]), (*old.tokens, token), (*old.log_probs, log_prob))))
        return found

    def _can_improve(self, length: int) -> bool:
        if len(self._finished) < self._width:
            return True
        return bool(self._running[0].score / length**self._length_penalty > self._finished[-1].score)
