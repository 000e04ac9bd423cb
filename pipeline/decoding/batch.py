"""Prompts that are decoded together, and that may join and leave at every step.

One loop for every runtime, which brings a `Stepper`. What a prompt becomes depends on the prompt, its sampling options
and its seed, never on its neighbours.

Legend: B rows of the batch (prompts, or prompts x beams), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from pipeline.decoding.beam import BeamSearch
from pipeline.decoding.choose import Chooser, likeliest, log_normalizer
from pipeline.engine import Array, Sampling

S = TypeVar("S")
P = TypeVar("P", contravariant=True)


class Stepper(Protocol[P, S]):
    """A model with a KV cache. `P` is what it takes as prompts, `S` its own record of a running batch.

    One that can take more prompts into a running batch also has
    `extend(state: S, prompts: P, room: int) -> Array`: as `prefill`, the new rows follow those that are there.
    """

    def prefill(self, prompts: P, room: int) -> tuple[S, Array]:
        """Read the prompts. Returns the running batch and the next token's logits [B, V] float32, a row a prompt.

        `room` is how many tokens will be fed by `step` at most, for those who allocate the cache ahead.
        """
        ...

    def step(self, state: S, tokens: Sequence[int], rows: Sequence[int]) -> Array:
        """Feed one token a row. Returns the next token's logits [B, V] float32, valid until the next call.

        The new row i continues the old row `rows[i]`: rows may be dropped (a prompt that ended), repeated and permuted
        (beams). `state` is changed in place.
        """
        ...


@dataclass(frozen=True, eq=False)
class Ask:
    """A continuation that is wanted."""

    key: Hashable
    """Names it in what `Batch` gives."""
    row: int
    """Its prompt's place among the prompts it comes with; several may continue one."""
    history: Sequence[int]
    """What the decoder has read: the prompt itself, or the start tokens of an encoder-decoder."""
    sampling: Sampling
    limit: int
    """The most tokens it may get, at least 1."""
    eos: frozenset[int]
    choice: int = 0
    """Tells continuations of one prompt and one seed apart."""


class Piece(NamedTuple):
    """One token of one continuation, in the order in which it became known."""

    key: Hashable
    token_id: int
    logprob: float
    """Of the model itself, before penalties, temperature and filters."""
    finished: bool
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens of that place with their log probabilities, as many as `Sampling.top_logprobs` asks for."""


class Batch(Generic[S]):
    """Continuations that run together. `add`, then `advance` until it is empty."""

    def __init__(self, model: Stepper[Any, S]) -> None:
        self._model = model
        self._state: S | None = None
        self._rows = 0  # of the state
        self._going: list[_One | _Beams] = []
        self._tokens: list[int] = []  # what the next step feeds, row by row in the order of `_going`
        self._parents: list[int] = []
        self._dropped: set[Hashable] = set()

    def __len__(self) -> int:
        """How many rows the next step feeds."""
        return len(self._tokens)

    @property
    def open(self) -> bool:
        """Whether more may be added now: to an empty batch always, to a running one if the model can."""
        return not self._tokens or hasattr(self._model, "extend")

    def add(self, prompts: Any, asks: Sequence[Ask]) -> list[Piece]:
        """Read prompts and begin their continuations. Returns each one's first token (of a beam search nothing yet)."""
        room = max(ask.limit for ask in asks) - 1
        if self._tokens:
            first = self._rows
            logits_BV = self._model.extend(self._state, prompts, room)  # type: ignore[attr-defined]
        else:
            first = 0
            self._state, logits_BV = self._model.prefill(prompts, room)
        self._rows = first + len(logits_BV)
        normalizer_B = log_normalizer(logits_BV)
        pieces: list[Piece] = []
        for ask in asks:
            one: _One | _Beams = _Beams(ask) if ask.sampling.beams > 1 else _One(ask)
            pieces += self._choose(one, logits_BV[ask.row][None], normalizer_B[ask.row][None], first + ask.row)
        return pieces

    def drop(self, key: Hashable) -> None:
        """Leave a continuation out from the next step on. Nobody waits for it any more."""
        self._dropped.add(key)

    def advance(self) -> list[Piece]:
        """One step of all: a token each. Empty when nothing runs."""
        self._leave()
        if not self._tokens:
            return []
        going, self._going = self._going, []
        tokens, parents = self._tokens, self._parents
        self._tokens, self._parents = [], []
        logits_BV = self._model.step(self._state, tokens, parents)  # type: ignore[arg-type]
        self._rows = len(tokens)
        normalizer_B = log_normalizer(logits_BV)
        pieces: list[Piece] = []
        row = 0
        for one in going:
            rows = slice(row, row + one.width)
            pieces += self._choose(one, logits_BV[rows], normalizer_B[rows], row)
            row = rows.stop
        if not self._tokens:
            self._state = None
        return pieces

    def _choose(self, one: _One | _Beams, logits: Array, normalizer: Array, row: int) -> Iterator[Piece]:
        yield from one.advance(logits, normalizer)
        if not one.done:
            self._going.append(one)
            self._tokens += one.tokens
            self._parents += [row + parent for parent in one.parents]

    def _leave(self) -> None:
        if not self._dropped:
            return
        going, tokens, parents, at = [], [], [], 0
        for one in self._going:
            rows = slice(at, at + one.width)
            at = rows.stop
            if one.key not in self._dropped:
                going.append(one)
                tokens += self._tokens[rows]
                parents += self._parents[rows]
        self._going, self._tokens, self._parents = going, tokens, parents
        self._dropped.clear()
        if not tokens:
            self._state = None


class _One:
    """One continuation, token by token."""

    def __init__(self, ask: Ask) -> None:
        self.key, self._ask = ask.key, ask
        self._chooser = Chooser(ask.history, ask.sampling, ask.choice)
        self._count = 0
        self.done = False
        self.width, self.parents = 1, [0]
        self.tokens: list[int] = []

    def advance(self, logits_1V: Array, normalizer_1: Array) -> Iterator[Piece]:
        token = self._chooser(logits_1V[0])
        self._count += 1
        self.done = token in self._ask.eos or self._count == self._ask.limit
        self.tokens = [token]
        top = likeliest(logits_1V[0], float(normalizer_1[0]), self._ask.sampling.top_logprobs)
        yield Piece(self.key, token, float(logits_1V[0, token] - normalizer_1[0]), self.done, top)


class _Beams:
    """The beams of one prompt: nothing is known before their end."""

    def __init__(self, ask: Ask) -> None:
        self.key = ask.key
        self._search = BeamSearch(ask.history, ask.sampling, ask.limit, ask.eos)
        self.done = False
        self.width = 1
        self.tokens: list[int] = []
        self.parents: list[int] = []

    def advance(self, logits_nV: Array, normalizer_n: Array) -> Iterator[Piece]:
        self.parents, self.tokens = self._search.advance(logits_nV - normalizer_n[:, None])
        self.width = len(self.tokens)
        self.done = self._search.done
        if self.done:
            best, log_probs = self._search.best()
            for place, (token, log_prob) in enumerate(zip(best, log_probs, strict=True), 1):
                yield Piece(self.key, token, log_prob, place == len(best))
