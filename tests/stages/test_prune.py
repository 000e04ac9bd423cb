"""2:4 pruning: which weights go, that the rest is untouched, and how the step enters any target's plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from pipeline.errors import RecipeError
from pipeline.stages import prune
from pipeline.stages.checkpoint import Checkpoint
from pipeline.stages.prune import PruneOptions
from pipeline.stages.prune_weights import mask
from pipeline.step import silent
from tests import models


def run(model: Path, out: Path, **options: Any) -> Path:
    out.mkdir()
    calibration = out.with_name("calibration")
    calibration.mkdir(exist_ok=True)
    (calibration / "data.txt").write_text("\n".join(models.CORPUS * 40))
    fields: dict[str, Any] = {"method": "wanda", "task": "text-generation", "samples": 6, "length": 16} | options
    prune.run({"model": model, "calibration": calibration}, PruneOptions(**fields), out, silent)
    return out


def fours(weight: np.ndarray) -> np.ndarray:
    """How many are not zero of every four."""
    return np.asarray((weight.reshape(len(weight), -1, 4) != 0).sum(-1))


def test_exactly_two_of_four_stay_and_those_are_untouched(tmp_path: Path) -> None:
    model = models.llama(tmp_path / "model", dtype="bfloat16", shard="100KB")
    out = run(model, tmp_path / "out")
    assert len(list(out.glob("*.safetensors"))) > 1
    before, after = Checkpoint(model), Checkpoint(out)
    pruned = 0
    for name, tensor in before.items():
        was, now = tensor.numpy("native"), after[name].numpy("native")
        if "layers" in name and was.ndim == 2:
            pruned += 1
            assert (fours(now) == 2).all()
            np.testing.assert_array_equal(now[now != 0], was[now != 0])
        else:
            np.testing.assert_array_equal(now, was)
    assert pruned == 14  # 2 layers: q, k, v, o, gate, up, down
    rest = [p.name for p in model.iterdir() if p.suffix != ".safetensors"]
    assert all((out / name).read_bytes() == (model / name).read_bytes() for name in rest)


def test_wanda_is_what_torch_says(tmp_path: Path) -> None:
    """Scores by hand from the inputs of one product, over the same samples."""
    from transformers import AutoModelForCausalLM

    from pipeline.stages import samples

    model = models.qwen2(tmp_path / "model")
    out = run(model, tmp_path / "out")
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    product, seen = whole.model.layers[1].mlp.down_proj, []
    product.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    encoder = samples.load_encoder(model, models.VOCAB)
    with torch.no_grad():
        for ids in samples.windows(tmp_path / "calibration" / "data.txt", encoder, 6, 16):
            whole(torch.from_numpy(ids)[None])
    norm = torch.cat([each[0] for each in seen]).norm(dim=0)
    scores = (product.weight.detach().abs() * norm).reshape(product.weight.shape[0], -1, 4)
    wanted = torch.zeros_like(scores).scatter_(-1, scores.topk(2, dim=-1).indices, 1).reshape(product.weight.shape)
    pruned = safetensors.numpy.load_file(out / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(pruned != 0, wanted.numpy() != 0)
    by_size = run(model, tmp_path / "magnitude", method="magnitude")
    other = safetensors.numpy.load_file(by_size / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert ((other != 0) != (pruned != 0)).any()


def test_layouts_prefixes_and_exclusions(tmp_path: Path) -> None:
    """GPT-2 stores [K, N]; a checkpoint of the bare model lacks the prefix that the task's class has."""
    gpt2 = run(models.gpt2(tmp_path / "gpt2"), tmp_path / "gpt2.out", exclude=("*h.0.*",))
    tensors = safetensors.numpy.load_file(gpt2 / "model.safetensors")
    first, second = (next(v for k, v in tensors.items() if k.endswith(f"h.{i}.mlp.c_fc.weight")) for i in (0, 1))
    assert (fours(second.T) == 2).all()
    assert not (fours(first.T) == 2).all()
    bert = run(models.bert(tmp_path / "bert", "fill-mask"), tmp_path / "bert.out", task="fill-mask")
    tensors = safetensors.numpy.load_file(bert / "model.safetensors")
    assert (fours(tensors["bert.encoder.layer.1.output.dense.weight"]) == 2).all()
    assert not (fours(tensors["bert.embeddings.word_embeddings.weight"]) == 2).all()
    with pytest.raises(RecipeError, match="matches no product"):
        run(tmp_path / "gpt2", tmp_path / "none", exclude=("*lm_head*",))


def test_ties_go_to_the_earlier() -> None:
    assert mask(np.ones((1, 8), np.float32)).tolist() == [[True, True, False, False] * 2]
    weight = np.array([[0.0, 0, 0, 5]], np.float32)
    assert mask(weight)[0, 3]
    assert mask(np.array([[1.0, 2, 3, 4]], np.float32), np.array([9.0, 1, 1, 1], np.float32)).tolist() == [
        [True, False, False, True]
    ]


def test_the_step_stands_between_the_model_and_all_but_the_reference(tmp_path: Path) -> None:
    from pipeline.cli.prepare import prepare
    from pipeline.store import Store

    models.llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text("words\n" * 100)
    recipe = tmp_path / "recipe.yaml"
    text = """\
name: pruned
model: {source: model}
CALIBRATION
targets:
  dense: {runtime: onnxruntime, precision: int8}
  sparse: {runtime: onnxruntime, precision: int8, prune: {}}
"""
    recipe.write_text(text.replace("CALIBRATION", "calibration: {path: text.txt, samples: 4, length: 8}"))
    plan = prepare(recipe, Store(tmp_path / "cache")).plan
    by_key, keys = plan.by_key(), plan.targets["sparse"]
    assert by_key[keys["pruned"]].options.method == "wanda"
    assert by_key[keys["pruned"]].needs["model"] == keys["model"]
    reads = {name: by_key[key].needs.get("model") for name, key in keys.items() if "model" in by_key[key].needs}
    assert reads.pop("reference") == reads.pop("pruned") == keys["model"]
    assert set(reads.values()) == {keys["pruned"]}
    assert by_key[keys["parity"]].needs["reference"] == keys["reference"] == plan.targets["dense"]["reference"]
    assert by_key[keys["parity.unquantized"]].needs["reference"] == keys["reference.pruned"]
    assert not set(plan.targets["dense"]) & {"pruned", "reference.pruned"}
    recipe.write_text(text.replace("CALIBRATION\n", ""))
    keys = prepare(recipe, Store(tmp_path / "cache")).plan
    assert keys.by_key()[keys.targets["sparse"]["pruned"]].options.method == "magnitude"
    recipe.write_text(text.replace("CALIBRATION\n", "").replace("prune: {}", "prune: {method: wanda}"))
    with pytest.raises(RecipeError, match="calibration data, and the recipe names none"):
        prepare(recipe, Store(tmp_path / "cache"))
