"""Decoders with a static KV cache: logits and continuations against torch, in pieces, with padding, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pipeline.engine import Sampling, completions
from pipeline.errors import RecipeError, UnavailableError
from pipeline.stages.onnx.families import read_decoder
from pipeline.stages.tensorrt import decoder as trt_decoder
from pipeline.stages.tensorrt import graph as trt_graph
from pipeline.stages.tensorrt.decoder import StaticOptions
from pipeline.stages.tensorrt.decoder_graph import check
from pipeline.stages.tensorrt.graph import GraphOptions
from pipeline.step import silent
from pipeline.targets import trt_judge
from tests.stages.decoders import EOS, reference, reference_logits, write_decoder

LENGTH = 48
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": (
        "Llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "mistral, a window of 8": ("Mistral", {"sliding_window": 8}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3", {"pad_token_id": 0}),
}  # fmt: skip


def engine(model: Path, root: Path, **options: Any) -> Path:
    """Export and type. Returns the folder of the typed graph."""
    export, out = root / "export", root / f"graph{len(list(root.glob('graph*')))}"
    if not export.exists():
        export.mkdir()
        trt_decoder.run({"model": model}, StaticOptions(cache_length=LENGTH), export, silent)
    out.mkdir()
    trt_graph.run({"model": model, "export": export}, GraphOptions(**options), out, silent)
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_torch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, over = FAMILIES[name]
    model = write_decoder(tmp_path / "model", kind, **over)
    folder = engine(model, tmp_path, precision="fp32")
    onnx.checker.check_model(str(folder / "model.onnx"))
    ids = np.random.default_rng(0).integers(5, 300, (3, 23))
    mask = np.ones_like(ids)
    mask[1, :7] = 0
    mask[2, 15:] = 0
    wanted = reference_logits(reference(model), ids, mask)
    for chunk in (64, 5):  # at once, and in pieces that continue in the cache
        monkeypatch.setattr(trt_judge._OrtStatic, "chunk", chunk)
        found = trt_judge.open_engine(folder).run({"input_ids": ids, "attention_mask": mask})["logits"]
        np.testing.assert_allclose(found[mask == 1], wanted[mask == 1], atol=2e-4)


def test_continuations_are_those_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model = write_decoder(tmp_path / "model", "Llama")
    opened = trt_judge.open_engine(engine(model, tmp_path, precision="fp32"))
    prompts = [[5, 6, 7], [9], list(range(20, 33))]
    torch_model = reference(model)
    sampling = Sampling(max_new_tokens=12, eos_token_ids=(EOS,))
    wanted = []
    for prompt in prompts:
        made = torch_model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=EOS)
        wanted.append(made[0, len(prompt) :].tolist())
    assert completions(opened, prompts, sampling) == wanted
    monkeypatch.setattr(trt_judge._OrtStatic, "largest_batch", 2)  # prompts take turns
    assert completions(opened, prompts, sampling) == wanted
    beams = completions(opened, prompts[:2], Sampling(max_new_tokens=6, beams=2, eos_token_ids=()))
    again = completions(opened, prompts[1:2], Sampling(max_new_tokens=6, beams=2, eos_token_ids=()))
    assert beams[1] == again[0]


def test_the_cache_is_the_end(tmp_path: Path) -> None:
    opened = trt_judge.open_engine(engine(write_decoder(tmp_path / "model", "Llama"), tmp_path, precision="fp32"))
    made = completions(opened, [[5] * (LENGTH - 3)], Sampling(max_new_tokens=32, eos_token_ids=()))
    assert len(made[0]) == 3
    with pytest.raises(RecipeError, match="do not fit"):
        opened.run({"input_ids": np.full((1, LENGTH + 1), 5)})


def test_fp16_and_int4(tmp_path: Path) -> None:
    model = write_decoder(tmp_path / "model", "Qwen2", dtype="bfloat16", tie_word_embeddings=True)
    ids = np.random.default_rng(0).integers(5, 300, (2, 20))
    whole = trt_judge.open_engine(engine(model, tmp_path, precision="fp32")).run({"input_ids": ids})["logits"]
    half = engine(model, tmp_path, precision="fp16")
    found = trt_judge.open_engine(half).run({"input_ids": ids})["logits"]
    assert 0 < np.abs(found - whole).max() < 0.1
    graph = onnx.load(half / "model.onnx").graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]}
    assert kinds["past_key_values.0.key"] == kinds["present.0.key"] == onnx.TensorProto.FLOAT16
    assert kinds["logits"] == onnx.TensorProto.FLOAT
    small = engine(model, tmp_path, precision="int4")
    found = trt_judge.open_engine(small).run({"input_ids": ids})["logits"]
    assert np.corrcoef(found.ravel(), whole.ravel())[0, 1] > 0.9  # random weights: no channel is like another
    assert (small / "model.onnx").stat().st_size < (half / "model.onnx").stat().st_size


def test_a_soft_cap_is_refused_by_name(tmp_path: Path) -> None:
    import json

    model = write_decoder(tmp_path / "model", "Gemma2", head_dim=16)
    config = json.loads((model / "config.json").read_text())
    with pytest.raises(UnavailableError, match=r"attn_logit_softcapping 50 .* self_attn"):
        check(read_decoder(config))
