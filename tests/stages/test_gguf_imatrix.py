"""The importance matrix: what it measures, and that it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pipeline.errors import StageError
from pipeline.stages.gguf import imatrix as gguf_imatrix
from pipeline.stages.gguf.file import read_tensors
from pipeline.stages.gguf.imatrix import ImportanceOptions, read_importance
from pipeline.stages.samples import load_encoder, windows
from pipeline.step import silent
from tests.conftest import ROOT
from tests.stages.ggufs import build, family

LLAMA = ROOT / "recipes" / "models" / "pydoc-llama"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "data.txt").write_bytes((ROOT / "recipes" / "data" / "pydoc-calibration.txt").read_bytes())
    return folder


@pytest.fixture(scope="module")
def measured(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("importance")
    options = ImportanceOptions(samples=3, length=48)
    gguf_imatrix.run({"model": LLAMA, "calibration": data}, options, out, silent)
    return out


def test_it_is_the_mean_square_of_what_enters_a_matrix(data: Path, measured: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
    ids = torch.from_numpy(windows(data / "data.txt", load_encoder(LLAMA, 4096), 3, 48))
    with torch.no_grad():
        first = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    expected = first.double().square().mean((0, 1)).numpy()
    found = read_importance(measured)
    np.testing.assert_allclose(found["blk.0.attn_q.weight"], expected, rtol=1e-5)
    np.testing.assert_array_equal(found["blk.0.attn_q.weight"], found["blk.0.attn_v.weight"])
    assert len(found) == 4 * 7
    assert not {"output.weight", "token_embd.weight"} & set(found)
    assert found["blk.3.ffn_down.weight"].shape == (768,)


def test_it_changes_the_quantized_tensors_alone(measured: Path, tmp_path: Path) -> None:
    plain, weighed = (
        next(build(LLAMA, tmp_path / name, "Q4_K_M", inputs).glob("*.gguf"))
        for name, inputs in (("plain", None), ("weighed", {"importance": measured}))
    )
    before, after = read_tensors(plain), read_tensors(weighed)
    changed = {name for name in before if before[name].read(plain) != after[name].read(weighed)}
    assert changed == {name for name in before if name.startswith("blk.") and "norm" not in name}


def test_a_mixture_is_refused(data: Path, tmp_path: Path) -> None:
    model = family(tmp_path / "model", "qwen3_moe", num_hidden_layers=1)
    with pytest.raises(StageError, match="mixture of experts"):
        gguf_imatrix.run({"model": model, "calibration": data}, ImportanceOptions(), tmp_path, silent)
