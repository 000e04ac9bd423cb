"""Answers that follow a JSON schema: llguidance says which tokens may come next."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engine import Array, Guide
from pipeline.errors import UnavailableError
from pipeline.serve.problems import BadRequest


class Grammars:
    """Guides over one tokenizer."""

    def __init__(self, folder: Path, vocab_size: int, eos: Sequence[int]) -> None:
        try:
            import llguidance
            import tokenizers
        except ImportError as error:
            raise UnavailableError(
                "llguidance is not installed, and answers by a JSON schema need it",
                hint="pip install 'enginewright[serve]'",
            ) from error
        # Its reader wants the vocabulary of the tokenizer itself; rows of the logits beyond it are never allowed.
        text = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).to_str()
        self._tokenizer = llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos))
        self._vocab_size = vocab_size
        self._library = llguidance

    def json(self, schema: dict[str, Any] | None) -> Callable[[], Guide]:
        """Guides to JSON of a schema, or to any JSON object. Raises BadRequest for a schema that it cannot follow."""
        matcher = self._library.LLMatcher
        try:
            text = json.dumps(schema if schema is not None else {"type": "object"})
            # Free white space lets a small model write line feeds until its limit.
            grammar = matcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": False})
            error = matcher.validate_grammar(grammar, self._tokenizer)
        except ValueError as problem:
            error = str(problem)
        if error:
            raise BadRequest(f"response_format: this schema cannot be followed: {error}", param="response_format")
        return lambda: _Guide(matcher(self._tokenizer, grammar), self._vocab_size)


class _Guide:
    def __init__(self, matcher: Any, vocab_size: int) -> None:
        import llguidance.numpy

        self._numpy = llguidance.numpy
        self._matcher = matcher
        self._mask = self._numpy.allocate_token_bitmask(1, vocab_size)

    def allow(self, logits_V: Array) -> Array:
        self._numpy.fill_next_token_bitmask(self._matcher, self._mask)
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: len(logits_V)].astype(bool)
        return np.where(allowed, logits_V, -np.inf)

    def accept(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
