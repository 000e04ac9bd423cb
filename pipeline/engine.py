"""Engine: the one door to a built model, which parity, bench and serve share.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pipeline.frozen import frozen

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
else:
    Array = (
        Any  # planning imports this module, and numpy takes a quarter of the time that a build without work may take
    )


@frozen
class Sampling:
    """How the next token is chosen. The defaults are greedy decoding."""

    max_new_tokens: int = 32
    beams: int = 1
    """Above 1: beam search with this width (excludes temperature above 0)."""
    length_penalty: float = 1.0
    """Beam search: scores are divided by length ** length_penalty."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    """Taken from the logits of every token that was generated."""
    frequency_penalty: float = 0.0
    """The same, as often as it was generated."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)."""
    top_logprobs: int = 0
    """How many of the likeliest tokens are told beside each one that was chosen."""
    guide: Callable[[], Guide] | None = None
    """Makes what says, for one continuation, which tokens may come next."""
    seed: int = 0
    eos_token_ids: tuple[int, ...] | None = None
    """None: what the model's generation config says; (): never stop early."""


class Guide(Protocol):
    """A grammar that a continuation has to follow."""

    def allow(self, logits_V: Array) -> Array:
        """A copy in which the logits of tokens that may not come next are -inf."""
        ...

    def accept(self, token: int) -> None:
        """Go on after the token that was chosen."""
        ...


class Token(NamedTuple):
    """One generated token of one prompt, in the order in which it became known."""

    prompt: int
    token_id: int
    logprob: float
    finished: bool


class Engine(Protocol):
    """What `Target.open` returns."""

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """One forward pass. Decoders: `input_ids` [B, T] int64 and `attention_mask` [B, T] int64 (0 = padding, on
        either side) in, `logits` [B, T, V] float32 out. Others: the names of the artifact's interface."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Token]:
        """Text-generation only: token ids in, tokens out. Beam search yields a prompt's tokens at its end."""
        ...


def completions(engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Run `generate` to its end: the new token ids of every prompt."""
    out: list[list[int]] = [[] for _ in prompts]
    for token in engine.generate(prompts, sampling):
        out[token.prompt].append(token.token_id)
    return out
