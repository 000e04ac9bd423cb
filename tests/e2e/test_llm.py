"""Folders for LLM servers through the command: one checkpoint for many targets, proofs, a kill, and the verbs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.stages.llm import check as llm_check
from tests import models
from tests.e2e.harness import Site, command, refused, wait_for
from tests.stages.llm import TEXT

QWEN3: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 3, "tie_word_embeddings": False,
}  # fmt: skip
# Random weights have no slack: what is asked of them is that the engine is the same model, not what int4 costs it.
LOOSE = "gates: {kld_mean: 1.0, top1: null, perplexity_ratio: null}"
HEAD = """\
name: qwen
model: {source: model}
parity: {prompt_count: 2, new_tokens: 4}
"""
SMALL = f"""{HEAD}
targets:
  hf-w4a16: {{runtime: transformers, precision: int4, {LOOSE}}}
  tm-w4a16: {{runtime: turbomind, precision: int4, {LOOSE}}}
"""
EVERY = f"""{HEAD}
calibration: {{path: text.txt, samples: 4, length: 32}}
targets:
  hf-bf16: {{runtime: transformers}}
  hf-w4a16: {{runtime: transformers, precision: int4, {LOOSE}}}
  hf-w8a8: {{runtime: transformers, precision: int8, quantize: {{method: smoothquant}}, {LOOSE}}}
  hf-fp8: {{runtime: transformers, precision: fp8, {LOOSE}}}
  vllm-w4a16: {{runtime: vllm, precision: int4, {LOOSE}}}
  tm-w4a16: {{runtime: turbomind, precision: int4, {LOOSE}}}
  tm-awq: {{runtime: turbomind, precision: int4, dtype: fp16, quantize: {{format: awq}}, {LOOSE}}}
  tm-fp8: {{runtime: turbomind, precision: fp8, quantize: {{block: true}}, {LOOSE}}}
"""
Made = tuple[Site, dict[str, dict[str, Any]]]


def site_of(root: Path, recipe: str, **over: Any) -> Site:
    """A folder with the recipe, a random Qwen3 and a text."""
    models.qwen3(root / "model", dtype="bfloat16", **{**QWEN3, **over})
    (root / "recipe.yaml").write_text(recipe, "utf-8")
    (root / "text.txt").write_text(TEXT, "utf-8")
    return Site(root, root / "cache", root / "out")


def build(site: Site) -> Made:
    done = site.build("--format", "json")
    assert done.code == 0, done.err
    return site, {each["target"]: each for each in done.json["targets"]}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return build(site_of(tmp_path_factory.mktemp("llm"), SMALL))


def test_one_checkpoint_two_targets(built: Made) -> None:
    site, made = built
    assert {name: each["outcome"] for name, each in made.items()} == {"hf-w4a16": "passed", "tm-w4a16": "deferred"}
    assert made["tm-w4a16"]["checkpoint"]["outcome"] == "passed"
    assert len(site.entries("llm.quantize")) == 1
    hf, tm = (site.out / "qwen" / name for name in made)
    shards = [path.stat().st_ino for path in sorted(hf.glob("model-*.safetensors"))]
    assert shards == [path.stat().st_ino for path in sorted(tm.glob("model-*.safetensors"))] and len(shards) == 5
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in tm.iterdir() if path.is_file())
    assert list(llm_check.examine(tm)) == []


def test_an_artifact_is_used_as_any_other(built: Made) -> None:
    hf, tm = (built[0].out / "qwen" / name for name in built[1])
    assert command("enginewright", "verify", "--run", hf).code == 0
    refused(command("enginewright", "verify", "--run", tm), 5, "needs a CUDA device")
    said = command("enginewright", "generate", hf, "--prompt", "the fox", "--max-new-tokens", "3", "--format", "json")
    assert said.json["completion_tokens"] == 3
    refused(command("enginewright", "generate", tm, "--prompt", "a"), 5, "needs a CUDA device")
    shown = command("enginewright", "inspect", tm).out
    assert "--backend turbomind" in shown and "parity-checkpoint: passed on" in shown
    states = {
        each["runtime"]: each["ok"] for each in command("enginewright", "doctor", "--format", "json").json["runtimes"]
    }
    assert states["transformers"] and states["vllm"] and states["turbomind"]


def test_a_gate_that_the_checkpoint_fails_fails_the_build(built: Made, tmp_path: Path) -> None:
    site = built[0].elsewhere(tmp_path / "strict")
    done = site.build("--target", "tm-w4a16", "--set", "targets.tm-w4a16.gates.kld_mean=1e-12")
    refused(done, 4, "tm-w4a16: its checkpoint", "kld_mean", "nothing was published")
    assert not list(site.out.glob("*/*/manifest.json"))


@pytest.mark.slow
def test_every_scheme_in_one_run_and_the_same_bytes_again(tmp_path: Path) -> None:
    site, made = build(site_of(tmp_path / "site", EVERY))
    assert {name: each["outcome"] for name, each in made.items()} == {
        **dict.fromkeys(("hf-bf16", "hf-w4a16", "hf-w8a8", "hf-fp8"), "passed"),
        **dict.fromkeys(("vllm-w4a16", "tm-w4a16", "tm-awq", "tm-fp8"), "deferred"),
    }
    assert {each["checkpoint"]["outcome"] for each in made.values() if "checkpoint" in each} == {"passed"}
    # The calibration is observed once, and three targets are of one scheme.
    assert len(site.entries("llm.observe")) == 1
    assert len(site.entries("llm.quantize")) == 6
    engines = [f"{runtime}.engine" for runtime in ("transformers", "vllm", "turbomind")]
    again = site.elsewhere(tmp_path / "again", "llm.observe", "llm.quantize", *engines)
    shutil.rmtree(again.cache / "last", ignore_errors=True)
    assert again.made() == {name: each["artifact_id"] for name, each in made.items()}


@pytest.mark.slow
def test_a_build_that_was_killed_goes_on_with_the_next_layer(tmp_path: Path) -> None:
    """kill -9 between two layers: the layers that were done are not made again, and the artifact is the same."""
    recipe = EVERY.replace("precision: int4, ", "precision: int4, quantize: {method: gptq}, ", 1)
    recipe = recipe.replace("kld_mean: 1.0", "kld_mean: null")  # twelve random layers make of int4 what they will
    site = site_of(tmp_path / "site", recipe, num_hidden_layers=12, hidden_size=512, intermediate_size=1024)
    argv = ("--target", "hf-w4a16")
    running = site.start(*argv)
    third = "llm.quantize-*/out/weights/model-00004-*.safetensors"
    found = wait_for(lambda: list((site.cache / "scratch").glob(third)), "the third layer's shard", 300)
    running.signal(9)
    running.end()
    kept = {path.name: path.stat().st_ino for path in found[0].parent.glob("model-*.safetensors")}
    assert 4 < len(kept) < 14 and not site.entries("llm.quantize")  # the shards of the ends are the first to be made
    made = site.made(*argv)
    weights = site.entries("llm.quantize")[0] / "out" / "weights"
    again = {path.name for path in weights.glob("model-*.safetensors") if kept.get(path.name) == path.stat().st_ino}
    # The layer under way when it was killed may be made once more: its output was not kept yet.
    assert len(set(kept) - again) <= 1
    assert site.leftovers() == []
    whole = Site(site.root, tmp_path / "cache", tmp_path / "out")
    assert whole.made(*argv) == made
