"""One engine folder for ONNX Runtime GenAI, transformers' tokenizer and Enginewright."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
import pytest

from pipeline.errors import StageError
from pipeline.stages.genai_layout import copy_model_files, write_genai_config
from tests.conftest import ROOT
from tests.stages.decoders import engine, reference, write_decoder

PYDOC = ROOT / "recipes" / "models" / "pydoc-llama"
PAD = 0
TASKS = Path("/proc/self/task")


def generate(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy continuations of a batch in GenAI, each up to its end-of-sequence token."""
    longest = max(map(len, prompts))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=longest + new, batch_size=len(prompts), do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([ids + [PAD] * (longest - len(ids)) for ids in prompts], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [list(map(int, generator.get_sequence(row)[longest:])) for row in range(len(prompts))]


def continuations(torch_model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    import torch

    found = []
    for ids in prompts:
        rows = torch_model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, pad_token_id=PAD)
        found.append(rows[0, len(ids) :].tolist())
    return found


@pytest.mark.skipif(not (PYDOC / "model.safetensors").exists(), reason="the trained model is not here")
def test_eight_prompts_go_on_as_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PYDOC)
    lines = (ROOT / "recipes" / "data" / "prompts.jsonl").read_text("utf-8").splitlines()
    prompts = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines][:8]
    assert len({len(ids) for ids in prompts}) > 3
    wanted = continuations(reference(PYDOC), prompts, 32)
    model = genai.Model(str(engine(PYDOC, tmp_path / "engine")))
    alone = [generate(model, [ids], 32)[0] for ids in prompts]
    assert [new[: len(each)] for new, each in zip(alone, wanted, strict=True)] == wanted
    together = generate(model, prompts, 32)
    assert [new[: len(each)] for new, each in zip(together, wanted, strict=True)] == wanted


@pytest.mark.parametrize("kind", ["Qwen3", "Gemma3Text", "Phi3"])
def test_families_generate_in_batches(tmp_path: Path, kind: str) -> None:
    extra = {"head_dim": 32} if kind != "Phi3" else {}
    model = write_decoder(tmp_path / "model", kind, **extra)
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16]]
    wanted = continuations(reference(model), prompts, 12)
    loaded = genai.Model(str(engine(model, tmp_path / "engine")))
    found = generate(loaded, prompts, 12)
    assert [new[: len(each)] for new, each in zip(found, wanted, strict=True)] == wanted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layout")
    return engine(write_decoder(path / "model", "Llama"), path / "engine", precision="int4", threads=2)


def test_a_moved_read_only_copy_generates(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    for path in copy.iterdir():
        path.chmod(0o444)
    copy.chmod(0o555)
    try:
        assert len(generate(genai.Model(str(copy)), [[5, 6, 7]], 5)[0]) == 5
        assert str(tmp_path) not in (copy / "genai_config.json").read_text()
    finally:
        copy.chmod(0o755)


def test_the_folder_has_what_every_reader_wants(folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    assert {path.name for path in folder.iterdir()} >= {
        "model.onnx", "genai_config.json", "engine.json", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert AutoConfig.from_pretrained(folder).model_type == "llama"
    ids = AutoTokenizer.from_pretrained(folder)("the quick fox")["input_ids"]
    assert genai.Tokenizer(genai.Model(str(folder))).encode("the quick fox").tolist() == ids


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "genai_config.json").read_text()))


def test_threads_are_explicit(folder: Path, tmp_path: Path) -> None:
    """Without the field GenAI takes half of the logical cores; 0 is one thread a core."""
    assert config_of(folder)["model"]["decoder"]["session_options"]["intra_op_num_threads"] == 2

    def workers(threads: int) -> int:
        copy = tmp_path / str(threads)
        shutil.copytree(folder, copy)
        config = config_of(copy)
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        (copy / "genai_config.json").write_text(json.dumps(config))
        before = len(list(TASKS.iterdir()))
        model = genai.Model(str(copy))
        found = len(list(TASKS.iterdir())) - before
        del model
        return found

    if TASKS.is_dir():
        one = workers(1)
        assert workers(3) == one + 2
        assert workers(0) >= one


SIZES = {"layers": 2, "kv_heads": 2, "head_dim": 16, "hidden_size": 64, "heads": 4, "vocab_size": 320}
TOKENS = {"bos_token_id": None, "eos_token_ids": [7, 8], "pad_token_id": None, "decoder_start_token_id": None}
DECODER: dict[str, Any] = {**SIZES, **TOKENS, "context_length": 99, "cache": "gqa"}


def written(tmp_path: Path, positions: bool = False, provider: str = "cpu", **decoder: Any) -> dict[str, Any]:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "do_sample": True, "top_k": 20}))
    export = {"decoder": DECODER | decoder}
    write_genai_config(tmp_path, export, tmp_path, threads=0, provider=provider, file="model.onnx", positions=positions)
    return config_of(tmp_path)


def test_what_the_config_says(tmp_path: Path) -> None:
    config = written(tmp_path)
    model, search = config["model"], config["search"]
    assert (model["type"], model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (
        "decoder",
        7,
        [7, 8],
        7,
    )
    assert (search["temperature"], search["do_sample"], search["top_k"], search["max_length"]) == (0.6, True, 20, 99)
    assert search["past_present_share_buffer"] and "position_ids" not in model["decoder"]["inputs"]
    assert model["decoder"]["session_options"]["provider_options"] == []
    cuda = written(tmp_path, provider="cuda")["model"]["decoder"]["session_options"]
    assert cuda["provider_options"] == [{"cuda": {}}]
    concat = written(tmp_path, positions=True, cache="concat", eos_token_ids=[2], pad_token_id=1)
    assert not concat["search"]["past_present_share_buffer"]
    assert concat["model"]["decoder"]["inputs"]["position_ids"] == "position_ids"
    assert (concat["model"]["eos_token_id"], concat["model"]["pad_token_id"]) == (2, 1)


def test_generation_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="has an eos_token_id"):
        written(tmp_path, eos_token_ids=[])


def test_weights_and_code_are_not_copied(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    out.mkdir()
    model.mkdir()
    for name in (
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors",
        "modeling_x.py",
        "README.md",
    ):
        (model / name).write_text("{}")
    assert copy_model_files(model, out) == ["config.json", "tokenizer.json", "chat_template.jinja"]
    assert len(list(out.iterdir())) == 3
