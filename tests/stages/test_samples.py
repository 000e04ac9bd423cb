"""Samples: what a data file becomes, and what is refused with file, line and offset."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import RecipeError
from pipeline.stages import samples
from tests.models import BOS, EOS, VOCAB, write_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> samples.Encoder:
    """A tokenizer that adds nothing."""
    folder = tmp_path_factory.mktemp("plain")
    write_tokenizer(folder, chat_template=CHAT)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return samples.load_encoder(folder, VOCAB)


@pytest.fixture(scope="module")
def framed(tmp_path_factory: pytest.TempPathFactory) -> samples.Encoder:
    """A tokenizer that puts BOS in front and EOS behind."""
    folder = tmp_path_factory.mktemp("framed")
    write_tokenizer(folder, pair=True)
    return samples.load_encoder(folder, VOCAB)


def data(tmp_path: Path, content: str | bytes, name: str = "data.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return samples.data_file(tmp_path)


def jsonl(tmp_path: Path, *records: Any) -> Path:
    return data(tmp_path, "\n".join(json.dumps(record) for record in records) + "\n", "data.jsonl")


def test_windows_are_the_running_text(plain: samples.Encoder, tmp_path: Path) -> None:
    text = "The quick brown fox.\n\nJumps over.\n\n\nThe lazy dog, and so on and on.\n"
    found = samples.windows(data(tmp_path, text), plain, 4, 8)
    assert found.shape == (4, 8)
    assert found.dtype == np.int64
    assert plain.encode(text, special=False).ids[:32] == found.ravel().tolist()
    assert text.startswith(plain.decode(found.ravel().tolist()))


def test_every_window_begins_with_the_prefix(framed: samples.Encoder, tmp_path: Path) -> None:
    assert framed.prefix == (BOS,)
    found = samples.windows(data(tmp_path, "the quick brown fox jumps over the lazy dog " * 4), framed, 3, 9)
    assert found[:, 0].tolist() == [BOS] * 3
    assert EOS not in found
    body = framed.encode("the quick brown fox jumps over the lazy dog " * 4, special=False).ids
    assert found[:, 1:].ravel().tolist() == body[:24]


def test_a_long_text_is_read_in_blocks(plain: samples.Encoder, tmp_path: Path, monkeypatch: Any) -> None:
    path = data(tmp_path, "\n\n".join(f"paragraph {n} of a text" for n in range(50)))
    whole = samples.windows(path, plain, 20, 16)
    monkeypatch.setattr(samples, "_BLOCK", 64)
    pieces = samples.windows(path, plain, 20, 16)
    assert plain.decode(pieces.ravel().tolist())[:200] == plain.decode(whole.ravel().tolist())[:200]


def test_lines_are_sentences(framed: samples.Encoder, tmp_path: Path) -> None:
    path = data(tmp_path, "\ufeffthe fox\r\n\n   \nthe lazy dog jumps over the quick brown fox\nnever read\n")
    found = samples.sequences(path, framed, 2, 6)
    assert found[0].ids == framed.encode("the fox").ids
    assert found[1].ids == [*framed.encode("the lazy dog jumps over the quick brown fox").ids[:5], EOS]
    assert [len(each.ids) for each in found][1] == 6
    assert [row.ids[0] for row in found] == [BOS, BOS]


def test_question_and_context(framed: samples.Encoder, tmp_path: Path) -> None:
    (found,) = samples.sequences(jsonl(tmp_path, {"question": "a fox", "context": "a dog"}), framed, 1, 50)
    assert found == framed.encode("a fox", "a dog")
    assert sorted(set(found.type_ids)) == [0, 1]


def test_records_of_text(plain: samples.Encoder, framed: samples.Encoder, tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": "the fox"}, {"prompt": "a dog"})
    found = samples.windows(path, plain, 2, 4)
    assert plain.decode(plain.encode("the fox\n\na dog\n\n", special=False).ids).startswith(
        plain.decode(found.ravel().tolist())
    )
    assert samples.prompts(path, framed, 2, decoder=True) == [
        [BOS, *framed.encode(text, special=False).ids] for text in ("the fox", "a dog")
    ]
    assert samples.prompts(path, framed, 1, decoder=False) == [framed.encode("the fox").ids]


def test_messages_go_through_the_template(plain: samples.Encoder, tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"messages": [{"role": "user", "content": "a fox?"}]})
    (prompt,) = samples.prompts(path, plain, 1, decoder=True)
    assert plain.decode(prompt) == "<user>a fox?<answer>"
    window = samples.windows(path, plain, 1, 4)
    assert "<user>a fox?".startswith(plain.decode(window[0].tolist()))


def test_messages_that_the_template_refuses(framed: samples.Encoder, tmp_path: Path) -> None:
    shutil.copy(framed.folder / "tokenizer.json", tmp_path)
    path = jsonl(tmp_path, {"messages": [{"role": "user", "content": "a fox?"}]})
    (framed.folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(RecipeError, match=r"data.jsonl:1: the chat template") as caught:
        samples.prompts(path, framed, 1, decoder=True)
    assert caught.value.hint == "use `prompt` instead of `messages`"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.txt", b"", "data.txt: the file is empty"),
        ("data.txt", b" \n\t\n", "data.txt: the file is empty"),
        ("data.txt", b"caf\xc3\xa9 \xff", "data.txt: not UTF-8: byte 0xff at offset 6"),
        ("data.jsonl", b'{"text": "a"}\n{"text": }\n', "data.jsonl:2:10: not JSON: Expecting value"),
        ("data.jsonl", b'\n["a"]\n', "data.jsonl:2: a JSON object is expected"),
        ("data.jsonl", b'{"txt": "a"}\n', "data.jsonl:1: found 'txt'"),
        ("data.jsonl", b"{}\n", "data.jsonl:1: found no fields"),
        ("data.jsonl", b'{"text": 3}\n', "data.jsonl:1: 'text' has to be a text, found int"),
        ("data.jsonl", b'{"question": "a"}\n', "data.jsonl:1: 'context' has to be a text, found NoneType"),
    ],
)
def test_bad_files(framed: samples.Encoder, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = data(tmp_path, content, name)
    with pytest.raises(RecipeError) as caught:
        samples.sequences(path, framed, 5, 8)
    assert caught.value.message.startswith(message)
    if "empty" in message or "UTF-8" in message:
        with pytest.raises(RecipeError):
            samples.windows(path, framed, 5, 8)


def test_too_little_text(plain: samples.Encoder, tmp_path: Path) -> None:
    path = data(tmp_path, "the quick brown fox\n\njumps\n")
    tokens = len(plain.encode("the quick brown fox\n\njumps\n", special=False).ids)
    with pytest.raises(RecipeError) as caught:
        samples.windows(path, plain, 32, 4)
    found = tokens // 4
    expected = f"data.txt has {found} samples of 4 tokens ({tokens} tokens of text), and 32 were asked for"
    assert caught.value.message == expected
    assert caught.value.hint == f"set `samples` to {found} or fewer, or give more text"
    with pytest.raises(RecipeError, match=r"has 2 samples .* 3 were asked for"):
        samples.sequences(path, plain, 3, 4)
    with pytest.raises(RecipeError, match="has 2 prompts, and 3 were asked for") as caught:
        samples.prompts(path, plain, 3, decoder=True)
    assert "prompt_count" in caught.value.hint


def test_a_tokenizer_of_another_model(plain: samples.Encoder, tmp_path: Path) -> None:
    small = samples.Encoder(plain.folder, 40, plain.tokenizer, (), fast=True)
    with pytest.raises(RecipeError, match="the tokenizer does not match the model: it gives the token id"):
        samples.windows(data(tmp_path, "the quick brown fox"), small, 1, 4)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no tokenizer.json"):
        samples.load_encoder(tmp_path, 100)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"tokenizer.json cannot be read"):
        samples.load_encoder(tmp_path, 100)


def test_a_folder_with_another_vocabulary_file(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "##es"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    encoder = samples.load_encoder(tmp_path, len(words))
    assert not encoder.fast
    assert encoder.encode("the foxes").ids == [2, 5, 6, 7, 3]
    assert encoder.encode("the", "fox") == samples.Encoded([2, 5, 3, 6, 3], [0, 0, 0, 1, 1])
    assert encoder.encode("the foxes", length=4).ids == [2, 5, 6, 3]
    assert encoder.prefix == (2,)


def test_padding_and_truncation_in_the_file_are_not_used(framed: samples.Encoder, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(framed.folder / "tokenizer.json"))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = samples.load_encoder(tmp_path, VOCAB)
    assert encoder.encode("the quick brown fox jumps").ids == framed.encode("the quick brown fox jumps").ids


def test_random_ids() -> None:
    def draw() -> np.ndarray:
        return samples.random_ids(np.random.Generator(np.random.PCG64(5)), 500, 10, (0, 2))

    assert np.array_equal(draw(), draw())
    assert set(draw().tolist()) == {1, 3, 4, 5, 6, 7, 8, 9}
    with pytest.raises(RecipeError, match="leaves none"):
        samples.random_ids(np.random.default_rng(0), 3, 2, (0, 1))


def test_no_data_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no data.txt or data.jsonl"):
        samples.data_file(tmp_path)
