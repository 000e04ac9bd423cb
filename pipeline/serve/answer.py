"""The text of one choice, token by token: where it stops, and what is told of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.decoding import Piece
from pipeline.text import Detokenizer


def token_text(tokenizer: Any, token: int) -> str:
    """A token by itself; bytes that are no character are written as bytes."""
    text = str(tokenizer.decode([token], skip_special_tokens=False))
    return text if "\N{REPLACEMENT CHARACTER}" not in text else f"<token {token}>"


@dataclass
class Told:
    """What is said of one token."""

    token: int
    text: str
    logprob: float | None
    top: list[tuple[str, float]]
    offset: int
    """Of its text in the choice's, in characters."""


@dataclass
class Choice:
    """A continuation as the client sees it."""

    tokenizer: Any
    prompt: Sequence[int]
    stop: Sequence[str]
    ends: frozenset[int]
    """Tokens at which it ended of its own accord."""
    told_logprobs: bool
    text: str = ""
    """What may be shown: the beginning of a stop text is held back until it is none."""
    tokens: int = 0
    finish: str | None = None
    told: list[Told] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._words = Detokenizer(self.tokenizer, self.prompt)
        self._held = ""

    def add(self, pieces: Sequence[Piece]) -> str:
        """Take tokens; the text that they make known. `finish` is set at the end: `stop` or `length`.

        Tokens after a stop text are left out: they were under way when it was seen.
        """
        if len(pieces) > 1 and (self.stop or self.told_logprobs):  # each has its own place in the text
            return "".join(self.add([piece]) for piece in pieces if not self.finish)
        self.tokens += len(pieces)
        last = pieces[-1]
        ended = last.token_id in self.ends
        if self.told_logprobs:
            self.told.append(self._told(last))
        shown = [piece.token_id for piece in (pieces[:-1] if ended else pieces)]
        new = self._words.add(*shown) if shown else ""
        if last.finished:
            new += self._words.flush()
            self.finish = "stop" if ended else "length"
        return self._show(new)

    def _told(self, piece: Piece) -> Told:
        top = [(token_text(self.tokenizer, token), log_prob) for token, log_prob in piece.top]
        text = token_text(self.tokenizer, piece.token_id)
        return Told(piece.token_id, text, piece.logprob, top, len(self.text) + len(self._held))

    def _show(self, new: str) -> str:
        held = self._held + new
        places = [place for place in (held.find(word) for word in self.stop) if place >= 0]
        if places:
            held, self._held, self.finish = held[: min(places)], "", "stop"
        elif self.finish:
            self._held = ""
        else:
            keep = max((_overlap(held, word) for word in self.stop), default=0)
            held, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.text += held
        return held


def _overlap(text: str, word: str) -> int:
    """How much of the end of a text could be the beginning of a word."""
    return next((size for size in range(min(len(text), len(word) - 1), 0, -1) if word.startswith(text[-size:])), 0)
