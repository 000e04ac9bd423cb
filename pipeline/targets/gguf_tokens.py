"""Compare llama.cpp's tokenizer, as a GGUF file sets it up, with the `tokenizers` library and the tokenizer.json."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.frozen import frozen
from pipeline.tables import table

if TYPE_CHECKING:
    from pipeline.targets.gguf_engine import Child

_DRAWN, _TOKENS = 256, 8
"""Texts of drawn tokens, and tokens in each."""


@frozen
class Difference:
    """A text that the two read differently."""

    kind: str
    """Part of the corpus, or `added`, or `drawn`."""
    text: str
    normalized: bool
    """Whether tokenizer.json's normalizer changes the text, as NFC does: llama.cpp has no normalizers."""
    expected: list[int]
    found: list[int]


def compare(child: Child, tokenizer_json: Path) -> tuple[list[Difference], int]:
    """Every difference on the corpus, and how many texts were compared. Special tokens are added on both sides."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = list(corpus(tokenizer))
    found = child.tokenize([text for _, text in texts], special=True)
    differences = []
    for (kind, text), ids in zip(texts, found, strict=True):
        expected = tokenizer.encode(text).ids
        if expected != ids:
            changed = tokenizer.normalizer is not None and _changes(tokenizer.normalizer, text)
            differences.append(Difference(kind, text, changed, expected, ids))
    return differences, len(texts)


def corpus(tokenizer: Any) -> Iterator[tuple[str, str]]:
    """(kind, text) of data/tokenizer_corpus.toml, then texts with the model's added tokens in them, then words of its
    own: tokens drawn by seed, which meet each other in ways that no list of texts has."""
    for kind, texts in table("tokenizer_corpus").items():
        yield from ((kind, text) for text in texts)
    for token in list(tokenizer.get_added_tokens_decoder().values())[:16]:
        for text in (token.content, f"a{token.content}b", f"one {token.content} two", f"{token.content}\n\nnext"):
            yield "added", text
    drawn, count = random.Random(0), tokenizer.get_vocab_size()
    for _ in range(_DRAWN):
        yield "drawn", str(tokenizer.decode([drawn.randrange(count) for _ in range(_TOKENS)]))


def _changes(normalizer: Any, text: str) -> bool:
    """Whether a normalizer does more than to write spaces in SentencePiece's way."""
    return bool(normalizer.normalize_str(text).replace("▁", " ").lstrip(" ") != text.replace("▁", " ").lstrip(" "))
