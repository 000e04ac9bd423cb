"""Decoding: the loop that turns a forward pass with a KV cache into tokens, the same for every runtime.

A runtime brings a `Stepper` (prefill and step); greedy choice, sampling, beam search, the end tokens and the limit are
here. What a prompt becomes depends on the prompt, the sampling options and the seed, not on the prompts beside it.

Legend: B rows of the batch (prompts, or prompts x beams), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from pipeline.decoding.beam import BeamSearch
from pipeline.decoding.choose import Chooser, log_normalizer
from pipeline.engine import Array, Sampling, Token
from pipeline.errors import RecipeError

__all__ = ["BeamSearch", "Chooser", "Stepper", "check", "decode", "limits"]

S = TypeVar("S")
P = TypeVar("P", contravariant=True)


class Stepper(Protocol[P, S]):
    """A model with a KV cache. `P` is what it takes as prompts, `S` its own record of a running batch."""

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


def check(sampling: Sampling) -> None:
    """Refuse options that contradict each other or have no meaning. Raises RecipeError naming the field."""
    wrong = [
        (sampling.max_new_tokens < 1, "max_new_tokens must be at least 1"),
        (sampling.beams < 1, "beams must be at least 1"),
        (not sampling.temperature >= 0, "temperature must not be negative"),
        (sampling.top_k < 0, "top_k must not be negative"),
        (not 0 < sampling.top_p <= 1, "top_p must be above 0 and at most 1"),
        (not 0 <= sampling.min_p <= 1, "min_p must be between 0 and 1"),
        (not sampling.repetition_penalty > 0, "repetition_penalty must be above 0"),
        (sampling.seed < 0, "seed must not be negative"),
        (sampling.beams > 1 and sampling.temperature > 0, "beams above 1 and temperature above 0 exclude each other"),
    ]
    for is_wrong, message in wrong:
        if is_wrong:
            raise RecipeError(f"sampling: {message}", hint="see the options of `enginewright generate --help`")


def limits(lengths: Sequence[int], sampling: Sampling, context_length: int | None) -> list[int]:
    """How many tokens each prompt may get: max_new_tokens, or fewer where the context ends before.

    Raises RecipeError for a prompt that is empty or that fills the context.
    """
    for index, length in enumerate(lengths):
        if length < 1:
            raise RecipeError(f"prompt {index} is empty", hint="give at least one token")
        if context_length is not None and length >= context_length:
            raise RecipeError(
                f"prompt {index} has {length} tokens, and the engine's context ends at {context_length}",
                hint="shorten the prompt, or build with a longer context",
            )
    return [min(sampling.max_new_tokens, (context_length or n + sampling.max_new_tokens) - n) for n in lengths]


def decode(
    model: Stepper[P, S],
    prompts: P,
    history: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos_token_ids: Sequence[int],
    context_length: int | None = None,
) -> Iterator[Token]:
    """Tokens as they become known; those of a beam search at each prompt's end. The end token is yielded too.

    `history` is what the decoder has read of each prompt: the prompt itself, or the start tokens of an encoder-decoder.
    `eos_token_ids` are the model's; `sampling.eos_token_ids` has precedence. Raises RecipeError for wrong options.
    """
    check(sampling)
    limit = limits([len(ids) for ids in history], sampling, context_length)
    eos = frozenset(eos_token_ids if sampling.eos_token_ids is None else sampling.eos_token_ids)
    if not history:
        return
    if sampling.beams > 1:
        yield from _search(model, prompts, history, sampling, limit, eos)
    else:
        yield from _sample(model, prompts, history, sampling, limit, eos)


def _sample(
    model: Stepper[P, S],
    prompts: P,
    history: Sequence[Sequence[int]],
    sampling: Sampling,
    limit: Sequence[int],
    eos: frozenset[int],
) -> Iterator[Token]:
    choosers = [Chooser(ids, sampling) for ids in history]
    count = [0] * len(history)
    running = list(range(len(history)))  # row -> prompt
    state, logits_BV = model.prefill(prompts, max(limit) - 1)
    while True:
        normalizer_B = log_normalizer(logits_BV)
        tokens: list[int] = []
        rows: list[int] = []
        for row, prompt in enumerate(running):
            token = choosers[prompt](logits_BV[row])
            count[prompt] += 1
            finished = token in eos or count[prompt] == limit[prompt]
            if not finished:
                rows.append(row)
                tokens.append(token)
            yield Token(prompt, token, float(logits_BV[row, token] - normalizer_B[row]), finished)
        if not rows:
            return
        running = [running[row] for row in rows]
        logits_BV = model.step(state, tokens, rows)


def _search(
    model: Stepper[P, S],
    prompts: P,
    history: Sequence[Sequence[int]],
    sampling: Sampling,
    limit: Sequence[int],
    eos: frozenset[int],
) -> Iterator[Token]:
    searches = [BeamSearch(ids, sampling, most, eos) for ids, most in zip(history, limit, strict=True)]
    running = [(prompt, 1) for prompt in range(len(history))]  # (prompt, its number of rows), in the order of the rows
    state, logits_BV = model.prefill(prompts, max(limit) - 1)
    while True:
        log_probs_BV = logits_BV - log_normalizer(logits_BV)[:, None]
        tokens: list[int] = []
        rows: list[int] = []
        still: list[tuple[int, int]] = []
        first = 0
        for prompt, width in running:
            search = searches[prompt]
            parents, chosen = search.advance(log_probs_BV[first : first + width])
            if search.done:
                best, log_probs = search.best()
                for place, (token, log_prob) in enumerate(zip(best, log_probs, strict=True), 1):
                    yield Token(prompt, token, log_prob, place == len(best))
            else:
                rows += [first + parent for parent in parents]
                tokens += chosen
                still.append((prompt, len(chosen)))
            first += width
        if not rows:
            return
        running = still
        logits_BV = model.step(state, tokens, rows)
