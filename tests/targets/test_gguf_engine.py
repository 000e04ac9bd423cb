"""The Engine over llama.cpp: answers, every way of decoding, and what happens when llama.cpp does not survive."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pipeline.engine import Sampling, completions
from pipeline.errors import RecipeError, StageError, UnavailableError
from pipeline.stages.gguf import vocab as gguf_vocab
from pipeline.targets import gguf_llama
from pipeline.targets.gguf_engine import LlamaEngine, open_engine
from tests.conftest import ROOT
from tests.stages.ggufs import build, family

LLAMA = ROOT / "recipes" / "models" / "pydoc-llama"
PROMPTS = [[1, 600, 700, 800, 55], [1, 300], [1, 1000, 2000, 3000, 4000, 12, 13, 14]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(LLAMA, tmp_path_factory.mktemp("engine") / "f32", "F32")


@pytest.fixture(scope="module")
def engine(folder: Path) -> LlamaEngine:
    return open_engine(folder)


@pytest.fixture(scope="module")
def judge() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)


def test_padding_on_either_side_changes_nothing(engine: LlamaEngine) -> None:
    alone = engine.run({"input_ids": np.array([PROMPTS[1]])})["logits"][0]
    left = engine.run({"input_ids": np.array([[0, 0, *PROMPTS[1]]]), "attention_mask": np.array([[0, 0, 1, 1]])})
    right = engine.run({"input_ids": np.array([[*PROMPTS[1], 0]]), "attention_mask": np.array([[1, 1, 0]])})
    assert np.array_equal(left["logits"][0, 2:], alone)
    assert np.array_equal(right["logits"][0, :2], alone)
    with pytest.raises(RecipeError, match="padding between tokens"):
        engine.run({"input_ids": np.array([[1, 0, 5]]), "attention_mask": np.array([[1, 0, 1]])})


@pytest.mark.parametrize(
    "options", [{}, {"beams": 4}, {"repetition_penalty": 1.3}, {"beams": 3, "length_penalty": 2.0}], ids=str
)
def test_decoding_is_that_of_transformers(engine: LlamaEngine, judge: Any, options: dict[str, Any]) -> None:
    found = completions(engine, PROMPTS, Sampling(max_new_tokens=24, **options))
    same = {"num_beams" if name == "beams" else name: value for name, value in options.items()}
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        given = torch.tensor([prompt])
        out = judge.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=24, do_sample=False, **same)
        expected = out[0, len(prompt) :].tolist()
        assert tokens == expected


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(engine: LlamaEngine) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=0.9, top_p=0.9, seed=4)
    together = completions(engine, PROMPTS, sampling)
    assert completions(engine, [PROMPTS[0]], sampling)[0] == together[0]
    assert completions(engine, PROMPTS, Sampling(max_new_tokens=12, temperature=0.9, top_p=0.9, seed=5)) != together


def test_a_generation_that_another_request_interrupts_does_not_go_on(engine: LlamaEngine) -> None:
    tokens = engine.generate([PROMPTS[0]], Sampling(max_new_tokens=4))
    next(tokens)
    engine.run({"input_ids": np.array([PROMPTS[1]])})
    with pytest.raises(StageError, match="another request has taken the engine's cache"):
        next(tokens)


def test_generation_ends_with_the_context(engine: LlamaEngine) -> None:
    prompt = [1, *[700] * 1020]
    assert len(completions(engine, [prompt], Sampling(max_new_tokens=50, eos_token_ids=()))[0]) == 3
    with pytest.raises(RecipeError, match="context ends at 1024"):
        completions(engine, [[1, *[700] * 1023]], Sampling())


def test_mistakes_are_refused(engine: LlamaEngine, folder: Path) -> None:
    with pytest.raises(RecipeError, match="the vocabulary ends at 4095"):
        completions(engine, [[5000]], Sampling())
    with pytest.raises(RecipeError, match="300 sequences"):
        completions(engine, [[1]] * 100, Sampling(beams=3))
    with pytest.raises(RecipeError, match="unknown 'speed'"):
        open_engine(folder, {"speed": 9})
    with pytest.raises(RecipeError, match="kv is 'Q1'"):
        open_engine(folder, {"kv": "Q1"})


def test_a_child_that_is_killed_is_reported(folder: Path) -> None:
    engine = open_engine(folder)
    os.kill(engine.child._process.pid, signal.SIGKILL)
    with pytest.raises(StageError, match=r"llama\.cpp was ended by SIGKILL while it was asked to run"):
        engine.run({"input_ids": np.array([[1, 2]])})


def test_an_assert_in_ggml_ends_the_child_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary that has a text twice: read_vocab refuses it, so the file is written past it."""
    read = gguf_vocab.read_vocab

    def twice(*args: Any, **options: Any) -> Any:
        vocab = read(*args, **options)
        tokens = (*vocab.tokens[:-1], vocab.tokens[40])
        return gguf_vocab.Vocab(**{**vars(vocab), "tokens": tokens})

    monkeypatch.setattr(gguf_vocab, "read_vocab", twice)
    model = family(tmp_path / "model", "qwen2", num_hidden_layers=1)
    with pytest.raises(StageError, match=r"llama\.cpp was ended by SIGABRT while it was asked to open") as error:
        open_engine(build(model, tmp_path / "out"))
    assert "GGML_ASSERT" in error.value.hint


def test_a_damaged_file_is_reported_in_llama_cpps_words(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".gguf" else data)
    with pytest.raises(StageError, match=r"llama\.cpp does not load") as error:
        open_engine(tmp_path)
    assert "llama.cpp said" in error.value.hint


def test_a_library_of_another_llama_h_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_llama, "_KNOWN_CONTEXT", {**gguf_llama._KNOWN_CONTEXT, "n_ubatch": 7})
    with pytest.raises(UnavailableError, match=r"of another llama\.h: n_ubatch is 512, not 7"):
        gguf_llama.load()
