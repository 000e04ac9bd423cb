"""TensorRT-RTX through the commands, without a GPU: built, deferred, proved by its graph, refused by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import ROOT
from tests.e2e.harness import Done, Site, command, refused
from tests.stages.decoders import write_decoder

RECIPE = """\
name: small
model: {source: model}
parity: {prompt_count: 2, new_tokens: 6}
targets:
  rtx:
    runtime: tensorrt-rtx
    devices: [rtx-3090, rtx-4090, rtx-5090]
    batch: [1, 2, 4]
    sequence: [1, 8, 32]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("rtx")
    made = Site.write(root / "site", RECIPE)
    (made.root / "model").unlink()
    write_decoder(made.root / "model", "Qwen2")
    return made


def settles() -> bool:
    """Whether this machine lets a process order its threads (trt_alone.py), as root of a machine may."""
    asks = "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"
    return len(os.sched_getaffinity(0)) > 1 and not subprocess.run([sys.executable, "-c", asks], check=False).returncode


def artifact(site: Site) -> Path:
    return site.out / "small" / "rtx"


def test_built_here_and_proved_elsewhere(site: Site) -> None:
    done = site.build("--format", "json", "--junit", site.root / "junit.xml")
    assert done.code == 0, done.err
    (target,) = done.json["targets"]
    assert target["outcome"] == "deferred"
    assert target["graph"]["outcome"] == "passed"
    assert 0 < target["metrics"]["kld_mean"] < 1e-4
    said = command("enginewright", "inspect", "--format", "json", artifact(site)).json
    manifest, parity = said["manifest"], said["attestations"]
    device = manifest["target"]["device"]
    assert device["compute_capability"] == ["8.6", "8.9", "12.0"]
    assert device["min_driver"] == "580"
    settings = manifest["runtime"]["settings"]
    assert settings["flavour"] == "tensorrt-rtx"
    exact = {package: needs["exact"] for package, needs in manifest["runtime"]["requires"].items()}
    assert set(exact.values()) == {settings["version"]}
    assert settings["profiles"][0]["input_ids"] == [[1, 1], [2, 8], [4, 32]]
    assert parity["parity"]["predicate"]["verdict"] == "deferred"
    graph = parity["parity-graph"]["predicate"]
    assert graph["verdict"] == "passed"
    assert graph["metrics"]["greedy_equal"] == 1
    suites = {suite.get("name"): suite for suite in ElementTree.parse(site.root / "junit.xml").getroot()}
    assert suites["small/rtx/graph"].get("failures") == "0"
    assert int(suites["small/rtx"].get("skipped", 0)) > 0
    assert "deferred" in command("enginewright", "inspect", artifact(site)).out


def test_the_graph_is_the_same_from_an_empty_store(site: Site, tmp_path: Path) -> None:
    """What was judged, and the whole artifact where the compiling process may order its threads (trt_alone.py)."""

    def graph(place: Site) -> dict[str, object]:
        stages = {
            stage["stage"]: stage for stage in json.loads((artifact(place) / "manifest.json").read_text())["stages"]
        }
        assert not stages["tensorrt-rtx.engine"]["deterministic"]
        return {name: stage for name, stage in stages.items() if stage["deterministic"]}

    made = site.made()
    again = site.elsewhere(tmp_path / "again", "tensorrt-rtx.engine", "tensorrt.graph", "tensorrt.decoder")
    remade = again.made()
    assert graph(again) == graph(site)
    if settles():
        assert remade == made


def test_loading_needs_a_driver_and_the_very_plan(site: Site, tmp_path: Path) -> None:
    site.made()
    refused(command("enginewright", "verify", "--run", artifact(site)), 5, "compute capability 8.6", "has none")
    refused(command("enginewright", "generate", artifact(site), "-p", "the"), 5, "compute capability")
    broken = shutil.copytree(artifact(site), tmp_path / "broken")
    plan = broken / "1" / "model.plan"
    data = bytearray(plan.read_bytes())
    data[1000] ^= 1
    plan.chmod(0o644)
    plan.write_bytes(data)
    refused(command("enginewright", "verify", "--run", broken), 6, "1/model.plan: has other contents")


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("devices=[h100]", 5, ("compute capability 9.0", "runtime: tensorrt", "TurboMind")),
        ("devices=[rtx-3090,h200]", 5, ("compute capability 9.0",)),
        ("precision=fp8", 5, ("fp8 needs compute capability 8.9",)),
        ("precision=int8", 64, ("a decoder's activations are not calibrated", "int4")),
        ("precision=bf16", 0, ()),
        ("cache_length=100000", 64, ("the model's context ends at 256",)),
        ("sequence=[8,4,16]", 64, ("smallest, usual and largest must not fall",)),
        ("devices=[]", 64, ("has no GPU to build for", "hardware: rtx-4090")),
        ("build.strip_weights=true", 64, ("strip_weights: TensorRT-RTX cannot do that",)),
        ("runtime=tensorrt", 5, ("builds on a GPU of the kind", "this host has no GPU")),
    ],
)
def test_what_can_be_known_is_refused_before_anything_runs(
    site: Site, change: str, code: int, words: tuple[str, ...]
) -> None:
    done = site.build("--plan", "--set", f"targets.rtx.{change}")
    if code:
        refused(done, code, *words)
    else:
        assert done.code == 0, done.err


def test_fp8_for_ampere_and_operators_without_a_place(tmp_path: Path) -> None:
    """fp8 starts with Ada; GPT-2 is no family of the static exporter; a soft cap is not TensorRT's."""
    from tests import models

    models.bert(tmp_path / "bert")
    models.gpt2(tmp_path / "gpt2")
    write_decoder(tmp_path / "gemma", "Gemma2", head_dim=16)
    (tmp_path / "text.txt").write_text("words\n" * 40)

    def plan(model: str, target: str) -> Done:
        text = f"name: t\nmodel: {{source: {model}}}\ncalibration: {{path: text.txt, samples: 4, length: 8}}\n"
        (tmp_path / "recipe.yaml").write_text(f"{text}targets:\n  t: {{runtime: tensorrt-rtx, {target}}}\n")
        return command("build", tmp_path / "recipe.yaml", "--plan", "--cache", tmp_path / "cache")

    done = plan("bert", "precision: fp8, devices: [rtx-3090, rtx-4090]")
    refused(done, 5, "fp8 needs compute capability 8.9 or higher, and 8.6", "leave that machine out")
    assert plan("bert", "precision: fp8, hardware: rtx-4090").code == 0
    refused(plan("gpt2", "hardware: l4"), 5, "static decoder's exporter does not know model_type 'gpt2'")
    refused(plan("gemma", "hardware: l4"), 5, "attn_logit_softcapping 50", "self_attn", "onnxruntime")


@pytest.mark.slow
def test_the_shipped_recipes_build(tmp_path: Path) -> None:
    """MiniLM in fp16 and int8, the trained decoder in fp16 and int4; twice from an empty store."""
    for recipe, kinds in (("tensorrt-rtx", ("fp16", "int8")), ("tensorrt-rtx-decoder", ("fp16", "int4"))):
        ids = []
        for turn in ("first", "second"):
            place = tmp_path / recipe / turn
            argv = ("--cache", place / "cache", "--out", place / "out", "--format", "json")
            done = command("build", ROOT / "recipes" / f"{recipe}.yaml", *argv)
            assert done.code == 0, done.err
            targets = json.loads(done.out)["targets"]
            assert [target["precision"] for target in targets] == list(kinds)
            assert {target["graph"]["outcome"] for target in targets} == {"passed"}
            ids.append([target["artifact_id"] for target in targets])
        if settles():
            assert ids[0] == ids[1]
