"""The openvino target from the recipe to the artifact, as its users meet it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("openvino")

from tests import models
from tests.conftest import ROOT
from tests.e2e.harness import DATA, MODEL, Done, command, refused

SMALL = """\
name: small
model: {{source: {model}}}
parity:
  data: {{path: {data}/pydoc-heldout.txt, samples: 2, length: 64}}
  prompts: {data}/prompts.jsonl
  prompt_count: 2
  new_tokens: 8
targets:
  ov:
    runtime: openvino
    precision: int4
"""


def write(folder: Path, *edits: tuple[str, str], model: Path = MODEL) -> Path:
    """The small recipe in a folder, with words replaced."""
    text = SMALL.format(model=model, data=DATA)
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    (folder / "recipe.yaml").write_text(text, "utf-8")
    return folder / "recipe.yaml"


def plan(folder: Path, *edits: tuple[str, str], model: Path = MODEL) -> Done:
    recipe = write(folder, *edits, model=model)
    return command("build", recipe, "--plan", "--cache", folder / "cache", "--format", "json")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published int4 engine."""
    folder = tmp_path_factory.mktemp("openvino")
    done = command("build", write(folder), "--cache", folder / "cache", "--out", folder / "out", "--format", "json")
    assert done.code == 0, done.err
    (target,) = done.json["targets"]
    assert target["outcome"] == "passed" and 0 < target["metrics"]["kld_mean"] < 0.01
    return Path(target["artifact"])


def test_the_artifact_proves_itself_and_generates(artifact: Path) -> None:
    assert command("enginewright", "verify", "--run", artifact).code == 0
    done = command(
        "enginewright", "generate", artifact, "--prompt", "Return the", "-n", "8", "--ignore-eos", "--format", "json"
    )
    assert done.code == 0 and done.json["completion_tokens"] == 8
    assert "is not used" not in done.err  # it started from the blob


def test_the_manifest_says_for_what_the_blob_is(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text("utf-8"))
    stages = {stage["id"]: stage for stage in manifest["stages"]}
    assert stages["engine"]["scope"] == "isa" and "openvino" in stages["engine"]["tools"]
    assert manifest["target"]["isa"] and manifest["target"]["device"]["kind"] == "cpu"
    assert manifest["runtime"]["settings"]["kv_cache"] == "u8"
    assert manifest["runtime"]["settings"]["execution"] in ("f32", "bf16")
    roles = {file["path"]: file["role"] for file in manifest["files"]}
    expected = {"openvino_model.xml": "graph", "openvino_model.bin": "weights", "openvino_model.blob": "engine"}
    expected |= {"openvino_tokenizer.xml": "tokenizer", "graph.pbtxt": "serving"}
    assert {path: roles[path] for path in expected} == expected
    assert not re.search(rb"/(tmp|root|home|work)/", (artifact / "openvino_model.xml").read_bytes())


def test_on_another_cpu_the_ir_is_used_and_said_to_be(artifact: Path, tmp_path: Path) -> None:
    """What a host of another kind does is what this one does when the blob names another."""
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    engine = json.loads((copy / "engine.json").read_text("utf-8"))
    engine["compiled"]["openvino"] = "2024.0.0-1-old"
    (copy / "engine.json").chmod(0o644)
    (copy / "engine.json").write_text(json.dumps(engine), "utf-8")
    arguments = ("generate", copy, "--prompt", "Return the", "-n", "4", "--format", "json")
    done = command("enginewright", *arguments, "--no-verify")
    assert done.code == 0
    (line,) = [line for line in done.err.splitlines() if line]
    assert "compiled by OpenVINO 2024.0.0-1-old, this is 202" in line and "openvino_model.xml is compiled" in line
    refused(command("enginewright", *arguments), 6, "engine.json")


def test_init_proposes_it_and_doctor_knows_it(tmp_path: Path) -> None:
    assert command("enginewright", "init", MODEL, "-o", tmp_path / "new.yaml").code == 0
    assert "runtime: openvino" in (tmp_path / "new.yaml").read_text("utf-8")
    found = command("enginewright", "doctor", "--format", "json", "--cache", tmp_path / "cache").json
    assert {"openvino", "openvino-genai", "nncf"} <= set(found["packages"])
    assert next(row for row in found["runtimes"] if row["runtime"] == "openvino")["ok"]


INT4 = "precision: int4"
REFUSED = {
    "awq without data": (INT4, f"{INT4}\n    quantize: {{awq: true}}", 64, "add a `calibration:` section"),
    "awq of int8": (INT4, "precision: int8\n    quantize: {awq: true}", 64, "are for int4"),
    "an unknown group": (INT4, f"{INT4}\n    quantize: {{group_size: 48}}", 64, "group_size is 48"),
    "activations of int4": (INT4, f"{INT4}\n    scheme: activations", 64, "scheme: activations"),
    "f16 on AVX2": (INT4, f"{INT4}\n    hardware: x86-64-v3\n    execution: f16", 5, "needs a CPU that computes in it"),
    "bf16 on AVX2": (INT4, f"{INT4}\n    hardware: x86-64-v3\n    execution: bf16", 5, "would run f32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused_when_it_is_planned(case: str, tmp_path: Path) -> None:
    old, new, code, words = REFUSED[case]
    refused(plan(tmp_path, (old, new)), code, words)


def settings_and_steps(folder: Path, new: str) -> tuple[dict[str, object], list[str]]:
    done = plan(folder, (INT4, new))
    assert done.code == 0, done.err
    names = [step["step"].split("/")[-1] for step in done.json["steps"]]
    (key,) = [step["key"] for step in done.json["steps"] if step["step"].split("/")[-1] in ("ir", "engine")][:1]
    return {"key": key}, names


def test_what_executes_follows_the_hardware(tmp_path: Path) -> None:
    """A CPU with AMX computes in bf16 and one with AVX2 does not: their engines differ, and where one cannot run it is
    neither compiled nor judged."""
    avx2, names = settings_and_steps(tmp_path, f"{INT4}\n    hardware: x86-64-v3\n    compile: false")
    assert {"parity", "parity.f32", "parity.unquantized"} <= set(names)
    amx, names = settings_and_steps(tmp_path, f"{INT4}\n    hardware: x86-64-v4-amx")
    assert avx2 != amx
    from pipeline import hardware

    if "amx_bf16" not in hardware.probe().isa:
        assert "parity" not in names and "parity.f32" in names
    _, names = settings_and_steps(tmp_path, f"{INT4}\n    device: gpu")
    assert "parity" not in names and "ir" not in names


Make = Callable[[Path], Path]
ZOO: dict[str, Make] = {
    "gpt2": models.gpt2,
    "feature-extraction": models.sentence_transformer,
    "fill-mask": lambda path: models.bert(path, "fill-mask"),
    "text-classification": models.roberta,
    "token-classification": lambda path: models.bert(path, "token-classification"),
    "question-answering": lambda path: models.bert(path, "question-answering"),
    "image-classification": models.vit,
}
ALL = """\
name: zoo
model: {{source: model}}
calibration: {{path: {data}/sentences-calibration.txt, samples: 16, length: 32}}
parity: {{prompt_count: 2, new_tokens: 8}}
targets:
  fp32: {{runtime: openvino}}
  fp16: {{runtime: openvino, precision: fp16, gates: {loose}}}
  weights: {{runtime: openvino, precision: int8, scheme: weights, gates: {loose}}}
"""
# Of two random labels a token the direction is chance where both are small.
PTQ = "  int8: {{runtime: openvino, precision: int8, gates: {{cosine_mean: 0.9, cosine_min: null, {last}: null}}}}\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_task_builds_and_proves(name: str, tmp_path: Path) -> None:
    ZOO[name](tmp_path / "model")
    # Random weights say nothing of what int8 costs a trained model: only that it is the same model is asked there.
    loose = "{kld_mean: 0.1, top1: null, perplexity_ratio: 1.2}" if name == "gpt2" else "{top1: null}"
    if name == "feature-extraction":
        loose = "{}"
    text = ALL + ("" if name in ("gpt2", "image-classification") else PTQ)
    last = "spearman" if name == "feature-extraction" else "top1"
    (tmp_path / "recipe.yaml").write_text(text.format(data=DATA, loose=loose, last=last), "utf-8")
    argv = ("--cache", tmp_path / "cache", "--out", tmp_path / "out", "--format", "json")
    done = command("build", tmp_path / "recipe.yaml", *argv)
    assert done.code == 0, done.err
    assert {target["outcome"] for target in done.json["targets"]} == {"passed"}
    for target in done.json["targets"]:
        assert command("enginewright", "verify", "--run", target["artifact"]).code == 0


@pytest.mark.slow
def test_the_shipped_recipes_are_the_same_twice_and_under_another_name(tmp_path: Path) -> None:
    """Every precision of both recipes: artifact ids from an empty store, and again with the model's folder renamed."""
    ids: dict[str, dict[str, str]] = {}
    for name in ("a", "b"):
        site = tmp_path / name
        shutil.copytree(DATA, site / "data")
        shutil.copytree(MODEL, site / "models" / f"model-{name}-int4")
        for recipe in ("openvino.yaml", "openvino-minilm.yaml"):
            text = (ROOT / "recipes" / recipe).read_text("utf-8").replace("pydoc-llama\n", f"model-{name}-int4\n", 2)
            text = text.replace(f"name: model-{name}-int4", "name: pydoc-llama")
            (site / recipe).write_text(text, "utf-8")
            argv = ("--cache", site / "cache", "--out", site / "out", "--format", "json")
            done = command("build", site / recipe, *argv)
            assert done.code == 0, done.err
            made = {target["target"]: target["artifact_id"] for target in done.json["targets"]}
            ids.setdefault(recipe, {}).setdefault(name, json.dumps(made))
    assert all(found["a"] == found["b"] for found in ids.values())
    assert len(json.loads(ids["openvino.yaml"]["a"])) == 5
