"""The shipped recipes: their plans are golden files. A refactoring shows no difference; a change shows all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline import hardware
from pipeline.cli.prepare import prepare
from pipeline.plain import to_plain
from pipeline.run import toolchain
from pipeline.store import Store
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.stem))
def test_the_plan_is_the_golden_one(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys with every tool at version 0, on a named machine. ENGINEWRIGHT_REGENERATE=1 writes the file anew."""
    monkeypatch.setattr(toolchain, "version", lambda *_: "0")
    machine = hardware.load("x86-64-v3")
    monkeypatch.setattr(hardware, "probe", lambda: machine)
    lock = recipe.with_suffix(".lock").read_bytes()
    prepared = prepare(recipe, Store(tmp_path), locked=True)
    assert recipe.with_suffix(".lock").read_bytes() == lock
    found = {
        "steps": [
            {
                "step": step.label,
                "stage": step.stage.name,
                "version": step.stage.version,
                "options": to_plain(step.options, keyed=True) if step.needs else "the files in the lock",
                "key": step.key,
                "needs": step.needs,
            }
            for step in prepared.plan.steps
        ],
        "targets": {name: list(keys) for name, keys in prepared.plan.targets.items()},
    }
    golden = ROOT / "tests" / "golden" / "plans" / f"{recipe.stem}.json"
    if os.environ.get("ENGINEWRIGHT_REGENERATE"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    assert found == json.loads(golden.read_text("utf-8"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.stem))
def test_targets_share_every_step_but_their_own(recipe: Path, tmp_path: Path) -> None:
    plan = prepare(recipe, Store(tmp_path)).plan
    stages = [step.stage.name for step in plan.steps]
    assert stages.count("reference") == 1
    if recipe.stem == "llm-servers":  # observed once, and a checkpoint for each scheme, not for each target
        assert stages.count("llm.observe") == 1
        assert stages.count("llm.quantize") < len(plan.targets) == 8
        return
    # The builders of openvino's and gguf's decoders read the checkpoint, and a static cache is another graph.
    exports = ("onnx.encoder", "onnx.fused", "onnx.torch", "tensorrt.decoder")
    wanted = {"openvino": 0, "gguf": 0, "every-runtime": 2}.get(recipe.stem, 1)
    assert sum(name in exports for name in stages) == wanted


@pytest.mark.parametrize(
    ("machine", "reduced"), [("x86-64-v3", True), ("x86-64-v4", True), ("x86-64-v4-vnni", False), ("arm64", False)]
)
def test_int8_weights_have_7_bits_where_sums_saturate(machine: str, reduced: bool, tmp_path: Path) -> None:
    recipe, field = ROOT / "recipes" / "minilm.yaml", "targets.cpu-int8"
    found = [
        step.options.reduce_range
        for overrides in ([], [f"{field}.int8.reduce_range=false"])
        for step in prepare(recipe, Store(tmp_path), overrides=[f"{field}.hardware={machine}", *overrides]).plan.steps
        if step.stage.name == "onnxruntime.encoder" and step.label.startswith("cpu-int8")
    ]
    assert found == [reduced, False]
