"""Tokenised samples and prompts from a data file, or from a seed where no data are given.

A data directory holds exactly one file. `data.txt`: for decoders one running text, cut into windows; for encoders and
encoder-decoders one sample per line that is not empty. `data.jsonl`: an object per line with `text`, `prompt`,
`messages` (through the chat template), or `question` and `context`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import RecipeError
from pipeline.frozen import frozen

Ids = npt.NDArray[np.int64]

_BLOCK = 1 << 15  # characters that are tokenised at once: a long text is read only as far as it is needed
_OTHER_VOCABULARIES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json")


class Encoded(NamedTuple):
    """One text as token ids."""

    ids: list[int]
    type_ids: list[int]
    """0 for the first text, 1 for the second."""


@frozen
class Encoder:
    """A model folder's tokenizer, with every id checked against the model's vocabulary."""

    folder: Path
    vocab_size: int
    tokenizer: Any
    """A `tokenizers.Tokenizer`, or a tokenizer of transformers where the folder has no tokenizer.json."""
    prefix: tuple[int, ...]
    """What the tokenizer puts in front of every text (a BOS token, most often)."""
    fast: bool

    def encode(self, text: str, pair: str | None = None, *, special: bool = True, length: int | None = None) -> Encoded:
        """Token ids of a text, or of two; `special` adds the model's own tokens, `length` is where it is cut."""
        if self.fast:
            if length is None:
                self.tokenizer.no_truncation()
            else:
                self.tokenizer.enable_truncation(length)
            encoding = self.tokenizer.encode(text, pair, add_special_tokens=special)
            return self._checked(Encoded(list(encoding.ids), list(encoding.type_ids)))
        cut = {"truncation": length is not None, "max_length": length}
        found = self.tokenizer(text, pair, add_special_tokens=special, return_token_type_ids=True, **cut)
        return self._checked(Encoded(list(found["input_ids"]), list(found["token_type_ids"])))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, the model's own tokens included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def chat(self, messages: Any, where: str, *, answer: bool) -> str:
        """A conversation as the model's chat template writes it; `answer` opens the assistant's turn.

        The template carries the model's own tokens: encode the result with `special=False`.
        """
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
        except Exception as error:
            no_template = not getattr(tokenizer, "chat_template", None)
            hint = "use `prompt` instead of `messages`" if no_template else "see the template in tokenizer_config.json"
            raise RecipeError(f"{where}: the chat template does not take these messages: {error}", hint=hint) from error

    def _checked(self, encoded: Encoded) -> Encoded:
        top = max(encoded.ids, default=0)
        if top >= self.vocab_size:
            raise RecipeError(
                f"the tokenizer does not match the model: it gives the token id {top}, "
                f"and the vocabulary of the weights has {self.vocab_size} entries",
                hint=f"put the tokenizer that the model was trained with into {self.folder.name}",
            )
        return encoded


def load_encoder(model_dir: Path, vocab_size: int) -> Encoder:
    """The tokenizer of a model folder. Raises RecipeError when there is none or it cannot be read."""
    file = model_dir / "tokenizer.json"
    if file.is_file():
        import tokenizers

        try:
            tokenizer: Any = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises Exception itself
            raise RecipeError(f"tokenizer.json cannot be read: {error}", hint="download it again") from error
        tokenizer.no_padding()  # files of sentence-transformers pad every text to a fixed length
        return _with_prefix(Encoder(model_dir, vocab_size, tokenizer, (), fast=True))
    if not any((model_dir / name).is_file() for name in _OTHER_VOCABULARIES):
        raise RecipeError(
            "the model folder has no tokenizer.json, which the data and the prompts need",
            hint="copy the tokenizer files into it, or remove the data and the prompts from the recipe's parity",
        )
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except Exception as error:  # each tokenizer class fails in its own way
        raise RecipeError(f"the tokenizer cannot be read: {error}", hint="save it as tokenizer.json") from error
    return _with_prefix(Encoder(model_dir, vocab_size, tokenizer, (), fast=False))


def windows(data: Path, encoder: Encoder, samples: int, length: int) -> Ids:
    """[samples, length] token ids for a decoder: the texts one after another, cut, each window with the prefix."""
    room = length - len(encoder.prefix)
    if room < 1:
        raise RecipeError(f"a length of {length} tokens leaves no room for text", hint="raise `length`")
    ids: list[int] = []
    for piece in _running_text(data, encoder):
        ids += piece
        if len(ids) >= samples * room:
            break
    found = len(ids) // room
    if found < samples:
        raise _too_little(data, samples, found, f"of {length} tokens ({len(ids)} tokens of text)")
    body = np.array(ids[: samples * room], np.int64).reshape(samples, room)
    return np.concatenate([np.tile(np.array(encoder.prefix, np.int64), (samples, 1)), body], axis=1)


def sequences(data: Path, encoder: Encoder, samples: int, length: int) -> list[Encoded]:
    """One sample per line or record, with the model's own tokens, cut at `length`: for encoders."""
    found: list[Encoded] = []
    for where, record in _records(data):
        if len(found) == samples:
            break
        if "question" in record:
            texts: tuple[str, str | None] = _string(record, "question", where), _string(record, "context", where)
        else:
            texts = _text(record, where, encoder, answer=False), None
        found.append(encoder.encode(*texts, special="messages" not in record, length=length))
    if len(found) < samples:
        raise _too_little(data, samples, len(found), "(one for each line that is not empty)")
    return found


def prompts(data: Path, encoder: Encoder, count: int, *, decoder: bool) -> list[list[int]]:
    """The first `count` prompts. A decoder's begin with the prefix and are left open at the end."""
    found: list[list[int]] = []
    for where, record in _records(data):
        if len(found) == count:
            break
        text = _text(record, where, encoder, answer=True)
        chat = "messages" in record
        if decoder and not chat:
            found.append([*encoder.prefix, *encoder.encode(text, special=False).ids])
        else:
            found.append(encoder.encode(text, special=not chat).ids)
        if not found[-1]:
            raise RecipeError(f"{where}: the prompt is empty", hint="remove the line")
    if len(found) < count:
        raise _too_little(data, count, len(found), "", what="prompts")
    return found


def random_ids(rng: np.random.Generator, length: int, vocab_size: int, excluded: Sequence[int] = ()) -> Ids:
    """[length] token ids, uniform over the vocabulary without `excluded`: pad and end tokens have side effects."""
    allowed = np.setdiff1d(np.arange(vocab_size, dtype=np.int64), np.array(sorted(set(excluded)), np.int64))
    if not len(allowed):
        raise RecipeError(
            f"a vocabulary of {vocab_size} tokens leaves none to draw from", hint="give data to the recipe"
        )
    return rng.choice(allowed, size=length)


def data_file(directory: Path) -> Path:
    """The one data file of a fetched data directory."""
    for name in ("data.txt", "data.jsonl"):
        if (directory / name).is_file():
            return directory / name
    raise RecipeError(f"no data.txt or data.jsonl in {directory.name}", hint="name a .txt or .jsonl file in the recipe")


def _with_prefix(encoder: Encoder) -> Encoder:
    """Find what the tokenizer puts in front by comparing a text with and without the model's own tokens."""
    bare, full = encoder.encode("a", special=False).ids, encoder.encode("a").ids
    places = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    prefix = tuple(full[: places[0]]) if bare and places else ()
    return Encoder(encoder.folder, encoder.vocab_size, encoder.tokenizer, prefix, encoder.fast)


def _running_text(data: Path, encoder: Encoder) -> Iterator[list[int]]:
    if data.suffix == ".jsonl":
        for where, record in _records(data):
            text = _text(record, where, encoder, answer=False)
            # Records are documents: a blank line keeps them apart, as in data.txt.
            yield encoder.encode(text if "messages" in record else text + "\n\n", special=False).ids
        return
    text, start = _read(data), 0
    while start < len(text):
        # A block ends after a blank line, where the pieces of a tokenizer end as well.
        end = text.find("\n\n", start + _BLOCK)
        stop = len(text) if end < 0 else end + 2
        yield encoder.encode(text[start:stop], special=False).ids
        start = stop


def _records(data: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of every line that is not empty; a line of plain text is a record with `text`."""
    for number, line in enumerate(_read(data).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{data.name}:{number}"
        if data.suffix != ".jsonl":
            yield where, {"text": line.strip()}
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecipeError(
                f"{where}:{error.colno}: not JSON: {error.msg}", hint="each line is one JSON object"
            ) from error
        if not isinstance(record, dict):
            raise RecipeError(f"{where}: a JSON object is expected", hint='write {"text": "..."}')
        yield where, record


def _text(record: dict[str, Any], where: str, encoder: Encoder, *, answer: bool) -> str:
    if "messages" in record:
        return encoder.chat(record["messages"], where, answer=answer)
    for name in ("prompt", "text"):
        if name in record:
            return _string(record, name, where)
    fields = ", ".join(map(repr, record)) or "no fields"
    raise RecipeError(f"{where}: found {fields}", hint="a record has `text`, `prompt` or `messages`")


def _string(record: dict[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise RecipeError(f"{where}: {name!r} has to be a text, found {type(value).__name__}")
    return value


def _read(data: Path) -> str:
    raw = data.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{data.name}: not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}",
            hint="convert it, for example with `iconv -t UTF-8`",
        ) from error
    if not text.strip():
        raise RecipeError(f"{data.name}: the file is empty", hint="give a file with text")
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _too_little(data: Path, asked: int, found: int, detail: str, what: str = "samples") -> RecipeError:
    has = f"{data.name} has {found} {what} {detail}".rstrip()
    field = "samples" if what == "samples" else "prompt_count"
    hint = f"set `{field}` to {found} or fewer, or give more text" if found else "give more text"
    return RecipeError(f"{has}, and {asked} were asked for", hint=hint)
