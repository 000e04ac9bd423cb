"""Which files of a model folder count, and what is refused with which words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.source import check_names, files_of_model, list_folder, name_problem

CONFIG = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()


def chosen(files: Mapping[str, bytes], *, code: bool = False) -> list[str]:
    """The names that count, of a folder called `m`."""
    return files_of_model(files, lambda name: files[name], "m", code=code)[0]


def refusal(files: Mapping[str, bytes]) -> str:
    """The whole text of the error for a folder called `m`."""
    with pytest.raises(RecipeError) as caught:
        chosen(files)
    return str(caught.value)


def model(**more: bytes) -> dict[str, bytes]:
    """A small folder; `__` in a name stands for a dot, `___` for a slash."""
    named = {name.replace("___", "/").replace("__", "."): data for name, data in more.items()}
    return {"config.json": CONFIG, "model.safetensors": b"w"} | named


def test_what_counts() -> None:
    kept = [
        "added_tokens.json", "additional_chat_templates/tool.jinja", "chat_template.jinja", "config.json",
        "generation_config.json", "merges.txt", "model.safetensors", "preprocessor_config.json", "source.spm",
        "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "LICENSE",
        "LICENSE-MODEL.md", "NOTICE.txt",
    ]  # fmt: skip
    dropped = [
        ".gitattributes", ".git/config.json", "README.md", "pytorch_model.bin", "tf_model.h5", "model.onnx",
        "onnx/model.onnx", "onnx/config.json", "openvino/openvino_model.xml", "training.json", "trainer_state.json",
        "training_args.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "model.fp16.safetensors",
        "modeling_own.py", "eval_results.json", "data_config.json", "requirements.txt", "checkpoint-5/config.json",
        "picture.png",
    ]  # fmt: skip
    files = dict.fromkeys([*kept, *dropped], b"{}")
    assert chosen(files) == sorted(kept)
    assert set(chosen(files, code=True)) - set(kept) == {"modeling_own.py"}


def test_shards_are_those_of_the_index() -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    files = {
        "config.json": CONFIG,
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-1.safetensors": b"",
        "model-2.safetensors": b"",
        "consolidated.safetensors": b"",
    }
    assert chosen(files) == [
        "config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    del files["model-2.safetensors"]
    assert refusal(files) == (
        "m/model-2.safetensors is missing: model.safetensors.index.json names it\nhint: download the folder again"
    )
    files["model.safetensors.index.json"] = b'{"metadata": {}}'
    assert "m/model.safetensors.index.json: no weight_map" in refusal(files)


def test_sentence_transformers_folders() -> None:
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    files = model(modules__json=json.dumps(modules).encode()) | {
        "1_Pooling/config.json": b"{}",
        "2_Dense/config.json": b"{}",
        "2_Dense/model.safetensors": b"",
        "2_Dense/pytorch_model.bin": b"",
        "other/config.json": b"{}",
    }
    assert [name for name in chosen(files) if "/" in name] == [
        "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
    ]  # fmt: skip
    del files["2_Dense/model.safetensors"]
    assert "m/2_Dense/pytorch_model.bin is a pickle" in refusal(files)
    del files["2_Dense/pytorch_model.bin"], files["1_Pooling/config.json"]
    assert "m/1_Pooling/config.json is missing: modules.json names the folder" in refusal(files)
    files["modules.json"] = b'{"path": 1}'
    assert "m/modules.json: expected a list of modules" in refusal(files)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({}, "m is empty\nhint: give a Hugging Face model folder, or `hf://org/name`"),
        ({".hidden": b""}, "m is empty"),
        ({"model.safetensors": b""}, "m has no config.json\nhint: "),
        (model(config__json=b'{\n "a": 1,\n}'), "m/config.json:3:1: not valid JSON: "),
        (model(config__json=b"[]"), "m/config.json:1: expected a JSON object, found list"),
        (model(config__json=b"{\n\n\xff}"), "m/config.json:3: not UTF-8 text (byte 0xff)"),
        (model(config__json=b""), "m/config.json:1:1: not valid JSON"),
        (model(config__json=b"[" * 100_000), "m/config.json: not valid JSON: nested too deeply"),
        (model(config__json=b"version https://git-lfs.github.com/spec/v1\n"), "hint: it is a Git LFS pointer"),
        ({"config.json": CONFIG}, "m has no weights: no model.safetensors and no model.safetensors.index.json"),
        ({"config.json": CONFIG, "tf_model.h5": b""}, "m has no safetensors weights, only TensorFlow (tf_model.h5)"),
        ({"config.json": CONFIG, "x.gguf": b""}, "m has no safetensors weights, only GGUF (x.gguf)"),
        ({"config.json": CONFIG, "consolidated.safetensors": b""}, "m has consolidated.safetensors but no model."),
        (
            {"config.json": CONFIG, "adapter_config.json": b"{}", "adapter_model.safetensors": b""},
            "m is an adapter, not a model\nhint: merge it first",
        ),
        (
            {"config.json": CONFIG, "pytorch_model.bin": b"", "training_args.bin": b""},
            "m has its weights as pickle (pytorch_model.bin): opening one runs code that is in it, so it is refused",
        ),
        ({"config.json": CONFIG, "training_args.bin": b""}, "m has no weights"),
        (model(vocab__json=b"", Vocab__json=b""), "m: Vocab.json and vocab.json differ only in case"),
        (model(**{"a\udcff__json": b""}), "m: the file name 'a\\udcff.json' is not UTF-8\nhint: rename the file"),
        (model(**{"a\n__json": b""}), "m: the file name 'a\\n.json' has a character that not every machine can hold"),
    ],
)
def test_refusals(files: dict[str, bytes], text: str) -> None:
    assert text in refusal(files)


@pytest.mark.parametrize("name", ["../x", "a//b", "a/./b", "/a", "a\\b", "c:d", "x ", "x.", "", "n" * 256])
def test_names_that_no_folder_should_have(name: str) -> None:
    assert name_problem(name)
    with pytest.raises(RecipeError):
        check_names([name], "m")


def test_plain_names_are_fine() -> None:
    assert not name_problem("1_Pooling/config.json")
    assert not name_problem("modèle-語.json")


def test_listing_follows_links_and_stays_shallow(tmp_path: Path) -> None:
    folder, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    for path in (folder / "1_Pooling" / "deep", blobs):
        path.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (folder / "config.json").symlink_to("../blobs/abc")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "1_Pooling" / "deep" / "x").write_text("")
    (folder / "loop").symlink_to(folder)
    found = list_folder(folder, "m")
    assert {"config.json", "1_Pooling/config.json"} <= set(found)
    assert not any("deep" in name for name in found)
    assert found["config.json"].read_text() == "{}"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(RecipeError, match=r"model\.gguf is a file, not a folder"):
        list_folder(tmp_path / "model.gguf", "model.gguf")
    with pytest.raises(RecipeError, match="there is no folder nowhere"):
        list_folder(tmp_path / "nowhere", "nowhere")


def test_the_converting_command_converts(tmp_path: Path) -> None:
    """The hint for a pickle checkpoint, run as it is printed: tied weights and all."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    made = LlamaForCausalLM(config).to(torch.bfloat16)
    made.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(made.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    files = {name: path.read_bytes() for name, path in list_folder(tmp_path / "m", "m").items()}
    command = refusal(files).partition("hint: convert it where you trust it: ")[2]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, env=env, capture_output=True)
    found = list_folder(tmp_path / "m-safetensors", "m")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(
        files_of_model(found, lambda name: found[name].read_bytes(), "m")[0]
    )
    again = LlamaForCausalLM.from_pretrained(tmp_path / "m-safetensors")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))


TOKENIZER = json.dumps(
    {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"},
     "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
     "truncation": None, "padding": None}
)  # fmt: skip
