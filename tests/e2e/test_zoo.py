"""One model of every task, with random weights, in every precision, from the recipe to the artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import models
from tests.e2e.harness import command

Make = Callable[[Path], Path]
ZOO: dict[str, Make] = {
    "gpt2": models.gpt2,
    "qwen3": models.qwen3,
    "feature-extraction": models.sentence_transformer,
    "fill-mask": lambda path: models.bert(path, "fill-mask"),
    "text-classification": models.roberta,
    "token-classification": lambda path: models.bert(path, "token-classification"),
    "question-answering": lambda path: models.bert(path, "question-answering"),
    "t5": lambda path: models.t5(path, initializer_factor=0.1),
    "whisper": models.whisper,
    "image-classification": models.vit,
}
# What fp32 must reach is the default. Random weights say nothing of what int8 costs a trained model: only that it is
# the same model is asked there.
RECIPE = """\
name: zoo
model: {{source: model}}
parity: {{prompt_count: 2, new_tokens: 8}}
targets:
  fp32:
    runtime: onnxruntime
  fp16: {{runtime: onnxruntime, precision: fp16, gates: {half}}}
  int8:
    runtime: onnxruntime
    precision: int8
    gates: {int8}
"""
LANGUAGE = "{kld_mean: 0.1, top1: null, perplexity_ratio: 1.2}"
CLASSES = "{top1: 0.8}"  # of 16 answers, two near ties may fall to the other side; another model gets next to none


OFTEN = ("fill-mask", "t5")  # an encoder and a pair of encoder and decoder; the others take minutes in all


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in ZOO])
def test_every_task_builds_and_proves(name: str, tmp_path: Path) -> None:
    ZOO[name](tmp_path / "model")
    language = name in ("gpt2", "qwen3", "t5", "whisper")
    half, int8 = (LANGUAGE, LANGUAGE) if language else ("{}", "{}" if name == "feature-extraction" else CLASSES)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(half=half, int8=int8), "utf-8")
    argv = ("--cache", tmp_path / "cache", "--out", tmp_path / "out", "--format", "json")
    done = command("build", tmp_path / "recipe.yaml", *argv)
    assert done.code == 0, done.err
    made = {target["target"]: target for target in json.loads(done.out)["targets"]}
    assert list(made) == ["fp32", "fp16", "int8"]
    assert {target["outcome"] for target in made.values()} == {"passed"}
    assert command("enginewright", "verify", "--run", made["int8"]["artifact"]).code == 0
    assert made["int8"]["size_bytes"] < 0.75 * made["fp32"]["size_bytes"]
    assert made["fp16"]["size_bytes"] < 0.75 * made["fp32"]["size_bytes"]
