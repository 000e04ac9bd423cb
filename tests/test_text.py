"""Text and tokens: whole characters only, and chat templates as transformers renders them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

tokenizers = pytest.importorskip("tokenizers")

from pipeline.errors import RecipeError, StageError  # noqa: E402
from pipeline.text import Detokenizer, chat_prompt, load_tokenizer  # noqa: E402
from tests import models  # noqa: E402

LLAMA = Path(__file__).parents[1] / "recipes" / "models" / "pydoc-llama"
TEXTS = [
    "The naïve café 👩‍👩‍👧 costs 5 €.",
    "日本語のテキスト、 and  spaces\n\n\tand é́ accents",
    "plain",
    " leading",
    "🤷🏽‍♀️",
]


def byte_level(folder: Path) -> Any:
    models.write_tokenizer(folder)
    return load_tokenizer(folder)


def byte_fallback(folder: Path) -> Any:
    """As Llama 2 and Gemma have it: words begin with a space, unknown characters are bytes."""
    vocabulary = {"<unk>": 0, "<s>": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    for piece in ("▁", "a", "n", "d", "p", "l", "i", "an", "and", "▁and", "▁pl"):
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [("a", "n"), ("an", "d"), ("▁", "and"), ("p", "l"), ("▁", "pl")]
    vocabulary.setdefault("pl", len(vocabulary))
    model = tokenizers.models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_together_the_text(make: Any, text: str, tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    words = Detokenizer(tokenizer)
    pieces = [words.add(token) for token in ids]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + words.flush() == tokenizer.decode(ids)
    assert len(text) < 8 or sum(bool(piece) for piece in pieces) > 1, "nothing streamed"


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_a_continuation_keeps_its_first_space(make: Any, tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    ids = tokenizer.encode("and plain and and and and and and and and plain", add_special_tokens=False).ids
    for cut in range(1, len(ids)):
        words = Detokenizer(tokenizer, ids[:cut])
        rest = "".join(words.add(token) for token in ids[cut:]) + words.flush()
        assert tokenizer.decode(ids[:cut]) + rest == tokenizer.decode(ids)


def test_any_tokens_give_the_text_of_all_of_them(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(rng.randrange(1, 40))]
        words = Detokenizer(tokenizer)
        assert "".join(map(words.add, ids)) + words.flush() == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_character_that_stays_incomplete_comes_at_the_end(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    ids = tokenizer.encode("a€", add_special_tokens=False).ids
    words = Detokenizer(tokenizer)
    assert [words.add(token) for token in ids[:-1]] == ["a", "", ""][: len(ids) - 1]
    assert words.flush() == tokenizer.decode(ids[:-1])[1:]


def test_long_output_decodes_a_few_tokens_at_a_time(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)

    class Counting:
        longest = 0

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            self.longest = max(self.longest, len(ids))
            return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    counting = Counting()
    words = Detokenizer(counting)
    for token in tokenizer.encode("brown fox " * 100).ids:
        words.add(token)
    assert counting.longest < 32


TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}[{{ m['content'] | trim }}]{% endif %}\n"
    "{% endfor %}",
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    "{% if add_generation_prompt %}<a>{% else %}<b>{% endif %}{% if tools is defined and tools %}T{% endif %}",
    "{{ messages[0]['content'] | tojson(indent=2) }}{{ unk_token }}{{ nothing_of_the_kind }}",
]
MESSAGES = [{"role": "system", "content": "Be <brief>."}, {"role": "user", "content": " Was ist «ä»? \n"}]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("place", ["config", "file", "named"])
def test_a_chat_is_what_transformers_renders(template: str, answer: bool, place: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    models.write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(template)
        config["chat_template"] = "the file has precedence"
    elif place == "config":
        config["chat_template"] = template
    else:
        config["chat_template"] = [{"name": "tool", "template": "no"}, {"name": "default", "template": template}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    judge = transformers.AutoTokenizer.from_pretrained(tmp_path)
    want = judge.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=answer)
    assert chat_prompt(tmp_path, MESSAGES, answer=answer) == want


def test_the_chat_of_the_model_that_ships(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    judge = transformers.AutoTokenizer.from_pretrained(LLAMA)
    want = judge.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    got = chat_prompt(LLAMA, MESSAGES)
    assert got == want
    ids = load_tokenizer(LLAMA).encode(got, add_special_tokens=False).ids
    assert ids == judge.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    with pytest.raises(RecipeError, match="roles are system, user and assistant"):
        chat_prompt(LLAMA, [{"role": "king", "content": "x"}])


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{% for x %}", "{{ 1 / 0 }}"],
)
def test_a_template_reaches_nothing_but_its_messages(template: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(RecipeError, match="chat template does not take these messages"):
        chat_prompt(tmp_path, MESSAGES)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no chat template"):
        chat_prompt(tmp_path, MESSAGES)
    with pytest.raises(StageError, match=re.escape("tokenizer.json is missing")):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StageError, match="cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(StageError, match="is not JSON"):
        chat_prompt(tmp_path, MESSAGES)
