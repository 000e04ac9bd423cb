"""Tokenizers in GGUF: read by llama.cpp as `tokenizers` reads tokenizer.json, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EnginewrightError, RecipeError, StageError, UnavailableError
from pipeline.stages.gguf import vocab as gguf_vocab
from pipeline.stages.gguf.vocab import BYTE, CONTROL, UNUSED, Vocab, read_vocab
from pipeline.targets.gguf_engine import open_file
from pipeline.targets.gguf_tokens import compare
from tests.stages.decoders import write_decoder
from tests.stages.ggufs import build
from tests.tokenizers_of import byte_level, put, sentencepiece

TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 960}
Document = dict[str, Any]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("tiny") / "model", "Llama", **TINY)


def with_tokenizer(tiny: Path, place: Path, tokenizer: str) -> Path:
    place.mkdir(parents=True)
    for file in tiny.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    return put(place, tokenizer)


@pytest.mark.parametrize("pre", [each["name"] for each in gguf_vocab._pre_tokenizers()])
def test_byte_level_is_told_by_its_regex_and_read_alike(tiny: Path, tmp_path: Path, pre: str) -> None:
    model = with_tokenizer(tiny, tmp_path / "model", byte_level(pre))
    assert read_vocab(model, 960).pre == pre
    engine = build(model, tmp_path / "out", "F16")
    differences, count = compare(open_file(engine, vocab_only=True), engine / "tokenizer.json")
    assert count > 100
    assert [each for each in differences if not each.normalized] == []
    # llama.cpp has no NFC: of this tokenizer, and of no other, the texts that are not NFC differ.
    assert (len(differences) > 4) == (pre == "qwen2")


@pytest.mark.parametrize("style", ["llama", "gemma"])
def test_sentencepiece_from_tokenizer_json_alone(tiny: Path, tmp_path: Path, style: str) -> None:
    model = with_tokenizer(tiny, tmp_path / "model", sentencepiece(style))
    assert not (model / "tokenizer.model").exists()
    vocab = read_vocab(model, 960)
    assert (vocab.model, vocab.space_prefix) == ("llama", style == "llama")
    assert vocab.types[4:260] == (BYTE,) * 256
    engine = build(model, tmp_path / "out", "F16")
    assert compare(open_file(engine, vocab_only=True), engine / "tokenizer.json")[0] == []


def test_a_space_that_llama_cpp_puts_elsewhere_is_counted(tiny: Path, tmp_path: Path) -> None:
    """Metaspace puts one before the first part of a text alone, and none before a space: GGUF can say neither."""
    model = with_tokenizer(tiny, tmp_path / "model", sentencepiece("mistral"))
    engine = build(model, tmp_path / "out", "F16")
    differences, _ = compare(open_file(engine, vocab_only=True), engine / "tokenizer.json")
    assert len([each for each in differences if each.kind == "added"]) > 4
    assert all(each.text[0] in " ▁" for each in differences if each.kind != "added")


def test_constant_scores_would_be_found(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the official converter writes where there is no tokenizer.model: it loads, and reads most texts wrongly."""
    flat(monkeypatch, scores=lambda vocab: tuple(-1000.0 for _ in vocab.scores))
    model = with_tokenizer(tiny, tmp_path / "model", sentencepiece("llama"))
    engine = build(model, tmp_path / "out", "F16")
    differences, count = compare(open_file(engine, vocab_only=True), engine / "tokenizer.json")
    assert len(differences) > count / 20


def test_a_wrong_pre_tokenizer_would_be_found(tiny: Path, tmp_path: Path) -> None:
    model = with_tokenizer(tiny, tmp_path / "model", byte_level("llama-bpe"))
    engine = build(model, tmp_path / "out", "F16", pre_tokenizer="gpt-2")
    differences, _ = compare(open_file(engine, vocab_only=True), engine / "tokenizer.json")
    assert len(differences) > 10


def flat(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """Have every vocabulary read with some fields changed."""
    read = gguf_vocab.read_vocab

    def changed(*args: Any, **options: Any) -> Vocab:
        vocab = read(*args, **options)
        return Vocab(**{**vars(vocab), **{name: change(vocab) for name, change in fields.items()}})

    monkeypatch.setattr(gguf_vocab, "read_vocab", changed)


def edited(tiny: Path, place: Path, edit: Any, base: str = "") -> Path:
    document: Document = json.loads(base or byte_level("gpt-2"))
    edit(document)
    return with_tokenizer(tiny, place, json.dumps(document))


def unknown_regex(document: Document) -> None:
    document["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\d+|\D+"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }


def twice(document: Document) -> None:
    document["added_tokens"].append({**document["added_tokens"][4], "id": 950})


REFUSED: dict[str, tuple[Any, type[EnginewrightError], str]] = {
    "a regex that is not known": (unknown_regex, UnavailableError, r"split \\d\+\|\\D\+"),
    "the same text twice": (twice, StageError, "the tokens 4 and 950 are both '<|user|>'"),
    "another model": (lambda d: d["model"].update(type="Unigram"), UnavailableError, "type Unigram"),
    "another normalizer": (lambda d: d.update(normalizer={"type": "NFKC"}), UnavailableError, "NFKC"),
    "a suffix": (lambda d: d["model"].update(end_of_word_suffix="</w>"), UnavailableError, "end_of_word_suffix"),
    "merges as llama.cpp does not": (
        lambda d: d["model"].update(ignore_merges=True),
        UnavailableError,
        "llama.cpp's gpt-2 has the other",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_does_not_have_is_refused(tiny: Path, tmp_path: Path, case: str) -> None:
    edit, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words):
        read_vocab(edited(tiny, tmp_path / "model", edit), 960)


def test_an_unknown_pre_tokenizer_can_be_named(tiny: Path, tmp_path: Path) -> None:
    model = edited(tiny, tmp_path / "model", unknown_regex)
    with pytest.raises(UnavailableError) as error:
        read_vocab(model, 960)
    assert "pre_tokenizer: NAME" in error.value.hint
    assert read_vocab(model, 960, "qwen2").pre == "qwen2"
    with pytest.raises(RecipeError, match="'qwen9' is not known"):
        read_vocab(model, 960, "qwen9")


def test_too_small_an_embedding_is_refused_and_a_large_one_is_padded(tiny: Path, tmp_path: Path) -> None:
    model = with_tokenizer(tiny, tmp_path / "model", byte_level("gpt-2"))
    with pytest.raises(StageError, match="the embedding has 700 rows"):
        read_vocab(model, 700)
    vocab = read_vocab(model, 960)
    assert len(vocab.tokens) == len(set(vocab.tokens)) == 960
    assert vocab.types[-1] == UNUSED
    assert vocab.types[1] == CONTROL


def without_ends(model: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        if (model / name).exists():
            said = json.loads((model / name).read_text())
            said.pop("eos_token_id", None)
            (model / name).write_text(json.dumps(said))
    (model / "tokenizer_config.json").write_text("{}")


def test_a_missing_eos_is_refused(tiny: Path, tmp_path: Path) -> None:
    """llama.cpp would take token 11 for it."""
    model = with_tokenizer(tiny, tmp_path / "model", byte_level("gpt-2"))
    without_ends(model)
    with pytest.raises(StageError, match="names an eos token"):
        read_vocab(model, 960)


def test_several_ends_get_keys_of_their_own(tiny: Path, tmp_path: Path) -> None:
    model = with_tokenizer(tiny, tmp_path / "model", byte_level("gpt-2"))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4, 0]}))
    assert read_vocab(model, 960).ends == (2, 4, 0)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4, 0, 3]}))
    with pytest.raises(UnavailableError, match="4 end tokens"):
        read_vocab(model, 960)
