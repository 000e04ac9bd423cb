"""The stage that writes a GGUF file: the structure of every family, the traps, types, and bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pipeline.errors import StageError, UnavailableError
from pipeline.stages.gguf import families as gguf_families
from pipeline.stages.gguf import metadata as gguf_metadata
from pipeline.stages.gguf import native as gguf_native
from pipeline.stages.gguf import tensors as gguf_tensors
from pipeline.stages.gguf.families import read_model
from pipeline.stages.gguf.file import read_tensors
from tests.models import BOS
from tests.stages.decoders import write_decoder
from tests.stages.ggufs import FAMILIES, build, divergence, engine, family, reference

GATE = 1e-6
"""Mean KL divergence of a file in F32 with a KV cache in F32."""


def ids(count: int = 96) -> list[int]:
    return [BOS, *np.random.default_rng(0).integers(6, 320, count - 1).tolist()]


def keys(folder: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(str(next(folder.glob("*.gguf")))).fields
    return {name: field.contents() for name, field in fields.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_the_same_model_in_llama_cpp(name: str, tmp_path: Path) -> None:
    model = family(tmp_path / "model", name, num_hidden_layers=FAMILIES[name][1].get("num_hidden_layers", 2))
    expected = reference(model, ids())
    found = engine(model, tmp_path / "out").run({"input_ids": np.array([ids()])})["logits"][0]
    assert divergence(expected, found) < GATE


WRONG = {
    "q and k not interleaved": ("llama, linear rope", "llama", {"permute": False}),
    "q and k interleaved": ("qwen2", "qwen2", {"permute": True}),
    "norms without their offset": ("gemma2", "gemma2", {"norm_offset": 0.0}),
}


@pytest.mark.parametrize("trap", WRONG)
def test_the_structural_gate_finds_what_loads_without_a_word(
    trap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, kind, wrong = WRONG[trap]
    model = family(tmp_path / "model", name, num_hidden_layers=2)
    table = gguf_families.families()
    monkeypatch.setattr(gguf_families, "families", lambda: {**table, kind: {**table[kind], **wrong}})
    found = engine(model, tmp_path / "out").run({"input_ids": np.array([ids()])})["logits"][0]
    assert divergence(reference(model, ids()), found) > 1e-3


def test_the_structural_gate_finds_missing_rope_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family(tmp_path / "model", "llama, llama3 rope", num_hidden_layers=2)
    monkeypatch.setattr(gguf_tensors, "rope_tensors", lambda rope: {})
    found = engine(model, tmp_path / "out").run({"input_ids": np.array([ids()])})["logits"][0]
    assert divergence(reference(model, ids()), found) > 1e-3


def test_tied_and_padded_embeddings(tmp_path: Path) -> None:
    model = family(tmp_path / "model", "qwen2, tied, yarn rope", num_hidden_layers=2, vocab_size=352)
    out = build(model, tmp_path / "out", "Q4_K_M")
    stored = read_tensors(next(out.glob("*.gguf")))
    assert "output.weight" not in stored
    assert stored["token_embd.weight"].type == "Q6_K"
    assert keys(out)["tokenizer.ggml.tokens"][-1] == "[PAD351]"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_checkpoint_in_shards_keeps_every_bit(tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file

    model = write_decoder(tmp_path / "model", "Qwen2", dtype, "100KB", hidden_size=64)
    assert len(list(model.glob("*.safetensors"))) > 1
    label = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    file = next(build(model, tmp_path / "out", label).glob("*.gguf"))
    stored = read_tensors(file)
    sources = {name: value for shard in model.glob("*.safetensors") for name, value in load_file(shard).items()}
    up = stored["blk.1.ffn_up.weight"]
    assert up.type == label
    assert (
        up.read(file) == sources["model.layers.1.mlp.up_proj.weight"].contiguous().view(torch.uint8).numpy().tobytes()
    )
    assert stored["blk.1.attn_q.bias"].type == "F32"


def test_two_builds_write_the_same_bytes(tmp_path: Path) -> None:
    model = family(tmp_path / "model", "qwen2", num_hidden_layers=2)
    first, second = (build(model, tmp_path / name, "Q4_K_M") for name in ("a", "b"))
    assert [file.name for file in sorted(first.iterdir())] == [file.name for file in sorted(second.iterdir())]
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_a_hidden_size_that_no_block_divides_is_refused_unless_allowed(tmp_path: Path) -> None:
    """llama-quantize writes 5.0 and 8.0 bit types into such a file and calls it Q4_K_M."""
    model = family(tmp_path / "model", "qwen2", hidden_size=192, intermediate_size=384, num_hidden_layers=2)
    with pytest.raises(StageError, match="would hold no tensor of type Q4_K: rows of 192, 384 values") as error:
        build(model, tmp_path / "refused", "Q4_K_M")
    assert "allow_fallback: true" in error.value.hint
    said = json.loads((build(model, tmp_path / "allowed", "Q4_K_M", allow_fallback=True) / "engine.json").read_text())
    quantization = said["quantization"]
    assert "Q4_K" not in quantization["tensors"]
    assert quantization["replaced"]["Q4_K -> Q5_0"] > 0
    assert quantization["bits_per_weight"] > 5.5


def test_mxfp4_of_a_dense_model_is_refused(tmp_path: Path) -> None:
    model = family(tmp_path / "model", "qwen2", num_hidden_layers=1)
    with pytest.raises(StageError, match="for the experts of a mixture"):
        build(model, tmp_path / "out", "MXFP4")


def test_mxfp4_is_for_experts(tmp_path: Path) -> None:
    out = build(family(tmp_path / "model", "qwen3_moe", num_hidden_layers=1), tmp_path / "out", "MXFP4")
    stored = read_tensors(next(out.glob("*.gguf")))
    assert {name: stored[f"blk.0.{name}.weight"].type for name in ("ffn_up_exps", "attn_q", "ffn_gate_inp")} == {
        "ffn_up_exps": "MXFP4",
        "attn_q": "Q8_0",
        "ffn_gate_inp": "F32",
    }


def test_bits_and_flags_are_said(tmp_path: Path) -> None:
    out = build(family(tmp_path / "model", "llama, linear rope", num_hidden_layers=2), tmp_path / "out", "Q8_0")
    found = keys(out)
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.ggml.eos_token_id"] == 2
    assert found["general.file_type"] == 7
    said = json.loads((out / "engine.json").read_text())["quantization"]
    assert 8.5 <= said["bits_per_weight"] < 8.7
    assert sum(said["tensors"].values()) == len(read_tensors(next(out.glob("*.gguf"))))


@pytest.mark.parametrize("name", ["phi3-mini", "My-Phi-3.5"])
def test_a_name_must_not_change_the_tokenizer(tmp_path: Path, name: str) -> None:
    """llama.cpp lets special tokens eat whitespace in a model whose name has phi3 in it, and needs tokens that are
    not here."""
    model = family(tmp_path / "model", "qwen2", num_hidden_layers=1)
    vocab = gguf_vocab_of(model)
    called = gguf_metadata.general_name(name, vocab)
    assert "phi3" not in called.lower()
    assert "phi-3" not in called.lower()


def gguf_vocab_of(model: Path) -> Any:
    from pipeline.stages.gguf.vocab import read_vocab

    return read_vocab(model, 320)


def test_a_value_beyond_half_precision_is_refused(tmp_path: Path) -> None:
    model = family(tmp_path / "model", "qwen2", num_hidden_layers=1)
    path = model / "model.safetensors"
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(StageError, match="does not fit F16"):
        build(model, tmp_path / "out", "F16")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "an unknown family": ("qwen2", {"model_type": "qwen9"}, "model_type 'qwen9'"),
    "an unknown field": ("qwen2", {"new_trick": 3}, "the field 'new_trick'"),
    "another activation": ("qwen2", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "an unknown rope": ("mistral", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic'"),
    "a range of yarn": (
        "qwen2",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 16.0}},
        "beta_fast 32",
    ),
    "a window that is not there": ("mistral", {"sliding_window": 64}, "no sliding window for a mistral"),
    "another pattern": ("gemma2", {"layer_types": ["full_attention"] * 4}, "all but every 2th"),
    "another scale": ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar is 99"),
    "experts whose weights do not sum to 1": ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=False"),
    "an output matrix where there is none": ("gemma2", {"tie_word_embeddings": False}, "no output matrix for a gemma2"),
    "a quantized checkpoint": ("qwen2", {"quantization_config": {"bits": 4}}, "quantization_config"),
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    names = {entry[0] for entry in REFUSED.values()}
    folder = tmp_path_factory.mktemp("configs")
    return {
        name: json.loads((family(folder / name, name) / "config.json").read_text("utf-8")) for name in sorted(names)
    }


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_run_as_another_model_is_refused(case: str, configs: dict[str, Any]) -> None:
    name, change, words = REFUSED[case]
    read_model(configs[name])
    with pytest.raises(UnavailableError, match=words):
        read_model({**configs[name], **change})


def test_null_is_not_the_default(configs: dict[str, Any]) -> None:
    """Mistral's window is 4096 where config.json has no word of it, and none where it says null."""
    config = {**configs["mistral"], "max_position_embeddings": 32768}
    assert read_model({**config, "sliding_window": None}).context == 32768
    del config["sliding_window"]
    with pytest.raises(UnavailableError, match="this model's is 4096"):
        read_model(config)


def test_a_context_within_the_window_is_the_same_model(configs: dict[str, Any]) -> None:
    assert read_model({**configs["mistral"], "sliding_window": 64}, 64).context == 64


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model = family(tmp_path / "model", "qwen2", num_hidden_layers=1)
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "model.extra.weight": np.zeros(3, np.float32)}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageError, match=r"'model\.extra\.weight', which a qwen2 model has no place for"):
        build(model, tmp_path / "out")


def test_without_a_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "xllamacpp.so").write_bytes(b"no library")
    monkeypatch.setattr(gguf_native, "libraries", lambda: iter([tmp_path / "xllamacpp.so"]))
    gguf_native.quantizer.cache_clear()
    try:
        with pytest.raises(UnavailableError, match=r"no prebuilt llama\.cpp library") as error:
            gguf_native.quantizer()
        assert "enginewright[gguf]" in error.value.hint
    finally:
        gguf_native.quantizer.cache_clear()
