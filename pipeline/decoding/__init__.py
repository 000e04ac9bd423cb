"""Decoding: the loop that turns a forward pass with a KV cache into tokens, the same for every runtime.

A runtime brings a `Stepper` (prefill and step); greedy choice, sampling, beam search, the end tokens and the limit are
here. What a prompt becomes depends on the prompt, the sampling options and the seed, not on the prompts beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.decoding.batch import Ask, Batch, Piece, Stepper
from pipeline.decoding.beam import BeamSearch
from pipeline.decoding.choose import Chooser
from pipeline.engine import Sampling, Token
from pipeline.errors import RecipeError

__all__ = ["Ask", "Batch", "BeamSearch", "Chooser", "Decoder", "Piece", "Stepper", "check", "decode", "limits"]

S = TypeVar("S")
P = TypeVar("P")


@dataclass(frozen=True, eq=False)
class Decoder:
    """What `Batch` needs of an engine whose prompts are token ids; engines that have it give it by `decoder()`."""

    stepper: Stepper[Any, Any]
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    context_length: int | None
    most_rows: int | None = None
    """Rows that may run at once; None: as many as memory holds."""
    most_tokens: int | None = None
    """Tokens of all rows together, prompts and limits; None: as many as memory holds."""


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
        (not -2 <= sampling.presence_penalty <= 2, "presence_penalty must be between -2 and 2"),
        (not -2 <= sampling.frequency_penalty <= 2, "frequency_penalty must be between -2 and 2"),
        (sampling.beams > 1 and _beyond_beams(sampling), "beams above 1 take repetition_penalty and no other filter"),
        (sampling.seed < 0, "seed must not be negative"),
        (sampling.beams > 1 and sampling.temperature > 0, "beams above 1 and temperature above 0 exclude each other"),
    ]
    for is_wrong, message in wrong:
        if is_wrong:
            raise RecipeError(f"sampling: {message}", hint="see the options of `enginewright generate --help`")


def _beyond_beams(sampling: Sampling) -> bool:
    others = (sampling.presence_penalty, sampling.frequency_penalty, sampling.logit_bias, sampling.top_logprobs)
    return any(others) or sampling.guide is not None


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
    batch = Batch(model)
    asks = [Ask(i, i, ids, sampling, most, eos) for i, (ids, most) in enumerate(zip(history, limit, strict=True))]
    pieces = batch.add(prompts, asks)
    while pieces or len(batch):
        for number, token, log_prob, finished, _ in pieces:
            yield Token(number, token, log_prob, finished)  # type: ignore[arg-type]  # the keys are places
        pieces = batch.advance()
