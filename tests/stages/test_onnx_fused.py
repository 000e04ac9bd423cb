"""The fused exporter against transformers: every family, every padding, prefill and decode."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pipeline.errors import RecipeError, StageError, UnavailableError
from pipeline.stages.onnx.families import families, read_decoder, why_not
from pipeline.stages.onnx.rope import rope_tables
from tests.conftest import ROOT
from tests.stages.decoders import (
    CASES,
    LLAMA3,
    PADDINGS,
    SIZES,
    engine,
    export,
    reference,
    reference_logits,
    session,
    step,
    write_decoder,
)


def test_every_family_of_the_table_is_tested() -> None:
    known = set(families()) - {"common", "rope"}
    assert {name.partition("-")[0] for name in CASES} == known


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Case -> (ONNX Runtime session, torch model), built when first asked for."""
    made: dict[str, tuple[Any, Any]] = {}

    class Builder(dict[str, tuple[Any, Any]]):
        def __missing__(self, case: str) -> tuple[Any, Any]:
            kind, over = CASES[case]
            layers = 7 if case == "gemma3_text" else 2  # the sixth layer is the first full one
            path = tmp_path_factory.mktemp(case)
            model = write_decoder(path / "model", kind, **({"num_hidden_layers": layers} | over))
            folder = engine(model, path / "engine")
            onnx.checker.check_model(folder / "model.onnx")
            self[case] = session(folder), reference(model)
            return self[case]

    return Builder(made)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(built: dict[str, tuple[Any, Any]], case: str, padding: str) -> None:
    run, torch_model = built[case]
    random = np.random.default_rng(1)
    left, right = PADDINGS[padding]
    rows, length, vocabulary = len(left), 20, SIZES["vocab_size"]
    ids = random.integers(5, vocabulary, (rows, length))
    mask = np.ones((rows, length), np.int64)
    for row, (before, behind) in enumerate(zip(left, right, strict=True)):
        mask[row, :before] = 0
        mask[row, length - behind :] = 0
    logits, past = step(run, ids, mask)
    expected = reference_logits(torch_model, ids, mask)
    assert expected.std() > 0.5  # the comparison means something
    assert np.abs(logits - expected)[mask == 1].max() < 1e-4
    # Where a window slides over a gap, transformers counts the gap and the cache here does not.
    windowed = any("window" in name for name in CASES[case][1]) and padding in ("right", "both")
    for _ in range(0 if windowed else 3):
        token = random.integers(5, vocabulary, (rows, 1))
        ids, mask = np.concatenate([ids, token], 1), np.concatenate([mask, np.ones((rows, 1), np.int64)], 1)
        logits, past = step(run, token, mask, past)
        expected = reference_logits(torch_model, ids, mask)
        assert np.abs(logits[:, 0] - expected[:, -1]).max() < 1e-4


@pytest.mark.parametrize("case", ["llama", "mistral-window", "gemma3_text"])
def test_a_prompt_may_come_in_chunks(built: dict[str, tuple[Any, Any]], case: str) -> None:
    run, torch_model = built[case]
    ids = np.random.default_rng(2).integers(5, SIZES["vocab_size"], (1, 30))
    found, past = [], None
    for start, stop in ((0, 11), (11, 24), (24, 30)):
        logits, past = step(run, ids[:, start:stop], np.ones((1, stop), np.int64), past)
        found.append(logits)
    expected = reference_logits(torch_model, ids, np.ones_like(ids))
    assert np.abs(np.concatenate(found, 1) - expected).max() < 1e-4


@pytest.mark.parametrize("case", ["mistral-window", "gemma2"])
def test_windows_count_real_tokens_only(built: dict[str, tuple[Any, Any]], case: str) -> None:
    """After right padding, a row goes on as it does alone."""
    run, _ = built[case]
    ids = np.random.default_rng(3).integers(5, SIZES["vocab_size"], (2, 12))
    mask = np.ones((2, 12), np.int64)
    mask[1, 5:] = 0
    _, past = step(run, ids, mask)
    token = np.array([[7], [9]])
    together, _ = step(run, token, np.concatenate([mask, [[1], [1]]], 1), past)
    _, alone = step(run, ids[1:, :5], np.ones((1, 5), np.int64))
    single, _ = step(run, token[1:], np.ones((1, 6), np.int64), alone)
    assert np.abs(together[1] - single[0]).max() < 1e-4


@pytest.mark.parametrize("case", ["llama", "llama-rope-llama3", "llama-rope-linear", "llama-rope-yarn", "phi3-partial"])
def test_rope_tables_are_those_of_transformers(built: dict[str, tuple[Any, Any]], case: str) -> None:
    import torch

    _, torch_model = built[case]
    rope = read_decoder(torch_model.config.to_dict() | {"architectures": [type(torch_model).__name__]}).ropes[0]
    cos, sin = rope_tables(rope, 256)
    wanted = torch_model.model.rotary_emb(torch.zeros(1), torch.arange(256)[None])
    half = cos.shape[1]
    # A torch build's power and cosine differ from numpy's in the last bit of the angle.
    assert np.abs(cos - wanted[0][0, :, :half].numpy()).max() < 3e-5
    assert np.abs(sin - wanted[1][0, :, :half].numpy()).max() < 3e-5


def test_old_and_new_rope_fields_mean_the_same(tmp_path: Path) -> None:
    base = {"model_type": "llama", **SIZES}
    old = base | {"rope_theta": 5e5, "rope_scaling": {key: LLAMA3[key] for key in LLAMA3 if key != "rope_theta"}}
    new = base | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}
    assert read_decoder(old) == read_decoder(new)
    legacy = base | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e4}
    assert read_decoder(legacy).ropes[0].kind == "linear"


def test_the_export_refers_to_the_checkpoint(tmp_path: Path) -> None:
    model = write_decoder(tmp_path / "model", "Llama", dtype="bfloat16", shard="100KB")
    folder = export(model, tmp_path / "export")
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "export.json"}
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    places = {
        entry.value for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert places == {path.name for path in model.glob("*.safetensors")} and len(places) > 2
    assert (folder / "model.onnx").stat().st_size < 100_000
    said = json.loads((folder / "export.json").read_text())
    assert said["decoder"]["eos_token_ids"] == [2] and said["decoder"]["cache"] == "gqa"
    assert [entry["name"] for entry in said["interface"]["inputs"]] == ["input_ids", "attention_mask"]
    again = export(model, tmp_path / "again")
    assert (again / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()


def test_context_length_bounds_the_tables(tmp_path: Path) -> None:
    model = write_decoder(tmp_path / "model", "Llama")
    folder = export(model, tmp_path / "export", context_length=32)
    assert json.loads((folder / "export.json").read_text())["decoder"]["context_length"] == 32
    with pytest.raises(RecipeError, match="max_position_embeddings is 256"):
        export(model, tmp_path / "longer", context_length=257)


REFUSED = {
    "model_type": ({"model_type": "mamba"}, "model_type 'mamba'"),
    "task": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "field": ({"no_rope_layers": [1, 0]}, "'no_rope_layers'"),
    "activation": ({"hidden_act": "xielu"}, "'xielu'"),
    "rope": ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1]}}, "'longrope'"),
    "rope width": ({"head_dim": 24}, "24 dimensions"),
    "rope field": ({"rope_scaling": {"rope_type": "linear", "factor": 2, "beta": 1}}, "'beta'"),
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    "layers": (
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention", "ssm"]},
        "'ssm'",
    ),
    "value": (
        {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_act": "relu"},
        "hidden_act='relu'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_by_name(name: str) -> None:
    change, word = REFUSED[name]
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES, **change}
    assert word in (why_not(config) or "")
    with pytest.raises(UnavailableError) as caught:
        read_decoder(config)
    assert caught.value.hint


def test_notes_and_switched_off_features_are_no_reason_to_refuse() -> None:
    notes = {"_name_or_path": "x", "unsloth_fixed": True, "use_bidirectional_attention": False, "temperature": 0.7}
    assert why_not({"model_type": "llama", **SIZES, **notes, "sliding_window": None}) is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"vocab_size": 400}, "vocab_size is 400"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1"),
        ({"num_hidden_layers": 3}, "no tensor 'model.layers.2"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_size": "64"}, "not of type int"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    model = write_decoder(tmp_path / "model", "Llama")
    config = json.loads((model / "config.json").read_text())
    config |= change
    (model / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(StageError, match=word):
        export(model, tmp_path / "export")


def test_tensors_without_a_place_are_refused(tmp_path: Path) -> None:
    model = write_decoder(tmp_path / "model", "Llama", attention_bias=True)
    config = json.loads((model / "config.json").read_text()) | {"attention_bias": False}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnavailableError, match=r"self_attn\.\w_proj\.bias"):
        export(model, tmp_path / "export")


def test_the_table_is_tidy() -> None:
    """Every fact that refers to a field refers to one with a default or one that every config.json has."""
    table = tomllib.loads((ROOT / "pipeline" / "data" / "decoder_families.toml").read_text("utf-8"))
    always = {"num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"}
    for name in set(table) - {"common", "rope"}:
        facts = {**table["common"], **table[name]}
        fields = {value[1:] for value in facts.values() if isinstance(value, str) and value.startswith("=")}
        assert fields - always - set(facts["defaults"]) == set(), name
