"""Measure the openvino target beside optimum-intel and ONNX Runtime, in one run on one machine.

    python bench/ov.py --optimum-intel PYTHON        every part, three builds each, five rounds
    python bench/ov.py --parts decode,start --rounds 3

`build`: int4 of decoders (group 128, with zero points), CPU seconds and peak memory. `quality`: both results held
against one reference by our own measures. `decode`: both in OpenVINO GenAI, and ours in its Engine. `start`: from
nothing to the first answer, from the blob and from the IR. `encoder`: MiniLM in OpenVINO and in ONNX Runtime.
Figures go to .bench/openvino.json, and the section of docs/benchmarks.md is written anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import builds
import decode
import environments
import inputs
import machine
import measure
import ov_page

HOME = environments.HOME
WORK = HOME / "openvino"
MODELS = ("pydoc-llama", "qwen2.5-0.5b-shape")
OURS, THEIRS = "Enginewright", "optimum-intel"
SAMPLES = {"pydoc-llama": (32, 256), "qwen2.5-0.5b-shape": (2, 64)}


def our_recipe(model: str) -> Path:
    samples, length = SAMPLES[model]
    gates = inputs.gates_off("text-generation", "int4")
    target: dict[str, object] = {"precision": "int4", "quantize": {"group_size": 128}, "gates": gates}
    folder = inputs.model(HOME, model)
    name = f"openvino-{model}"
    return inputs.recipe(
        HOME, name, {"int4": target}, model_folder=folder, samples=samples, length=length, runtime="openvino"
    )


def ours(model: str) -> Path:
    return WORK / model / "ours" / "out" / f"openvino-{model}" / "int4"


def theirs(model: str) -> Path:
    return WORK / model / "theirs" / "out"


def build(model: str, python: Path, runs: int) -> dict[str, Any]:
    """Each tool `runs` times from nothing, one after the other."""
    scripts, cli = Path(sys.executable).parent, python.parent / "optimum-cli"
    checkpoint, recipe = inputs.model(HOME, model), our_recipe(model)
    export = [str(cli), "export", "openvino", "-m", str(checkpoint), "--task", "text-generation-with-past"]
    export += ["--weight-format", "int4", "--group-size", "128", "--ratio", "1.0", "out"]
    here = ["--quiet", "--out", "out", "--cache", "cache"]
    draft = [str(scripts / "enginewright"), "draft", str(recipe), *here]
    sides = {
        "draft": draft,
        "draft without the blob": [*draft, "--set", "targets.int4.compile=false"],
        "whole build": [str(scripts / "build"), str(recipe), *here],
        THEIRS: export,
    }
    costs: dict[str, list[measure.Cost]] = {side: [] for side in sides}
    disk = {}
    for number in range(runs):
        for side, command in sides.items():
            work = WORK / model / {"whole build": "ours", THEIRS: "theirs"}.get(side, side.replace(" ", "-"))
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            log = HOME / "logs" / "openvino" / f"{model}-{work.name}-{number}.log"
            cost = measure.run(command, cwd=work, environment=builds.environment(), log=log)
            if cost.exit_code:
                raise SystemExit(f"{side} failed with exit code {cost.exit_code}: see {log}")
            costs[side].append(cost)
            disk[side] = [measure.disk_bytes([folder], [checkpoint]) for folder in (work, work / "out")]
            print(f"{model:20} {side:24} {cost.cpu_s:6.1f} CPU s {cost.peak_bytes / 1e6:6.0f} MB", flush=True)
    return {
        **{side: measure.median(found) for side, found in costs.items()},
        "disk_bytes": disk,
        "size_bytes": {OURS: decode_size(ours(model)), THEIRS: decode_size(theirs(model))},
    }


def decode_size(folder: Path) -> int:
    """The IR alone."""
    return sum((folder / f"openvino_model{suffix}").stat().st_size for suffix in (".xml", ".bin"))


def quality(model: str) -> dict[str, dict[str, float | None]]:
    """Both IRs by one measure: opened by our Engine with the settings of ours, against the stored reference."""
    from pipeline.parity.judge import finite, judge
    from pipeline.parity.stored import Stored
    from pipeline.targets.ov_engine import open_engine

    told = json.loads((ours(model) / "engine.json").read_text("utf-8"))
    view = WORK / model / "theirs" / "view"
    shutil.rmtree(view, ignore_errors=True)
    view.mkdir()
    for name in ("openvino_model.xml", "openvino_model.bin"):
        os.link(theirs(model) / name, view / name)
    (view / "engine.json").write_text(json.dumps({**told, "compiled": None}), "utf-8")
    (reference,) = (WORK / model / "ours" / "cache" / "results").glob("reference-*/out")
    stored = Stored.open(reference)
    return {
        side: finite(judge(stored, open_engine(folder)).metrics)
        for side, folder in ((OURS, ours(model)), (THEIRS, view))
    }


def decoding(model: str, rounds: int) -> list[dict[str, Any]]:
    """Every engine stays loaded; in each round they run one after the other."""
    found = [
        decode.Variant(f"{THEIRS} in GenAI", "openvino_genai", theirs(model)),
        decode.Variant(f"{OURS} in GenAI", "openvino_genai", ours(model)),
        decode.Variant(f"{OURS} in its Engine", "engine", ours(model)),
    ]
    children = [decode.Child(each, 128, 64, 2) for each in found]
    measured: list[list[dict[str, Any]]] = [[] for _ in children]
    for _ in range(rounds):
        for child, figures in zip(children, measured, strict=True):
            figures.append(child.go())
    rows = []
    for child, figures in zip(children, measured, strict=True):
        row = {"name": child.variant.name, **decode.summary(figures), "peak_bytes": child.end()}
        print(f"{model:20} {row['name']:28} {row['tokens_per_s']:7.1f} tokens/s {row['first_token_s'] * 1e3:6.0f} ms")
        rows.append(row)
    return rows


START = """\
import json, sys, time
from pathlib import Path
from pipeline.engine import Sampling
from pipeline.targets.ov_engine import open_engine
import numpy, openvino
folder, form = Path(sys.argv[1]), sys.argv[2]
if form == "ir":
    from pipeline.targets import ov_session
    ov_session.unfit = lambda *_: "it is measured"
    ov_session.LOG.disabled = True
started, cpu = time.perf_counter(), time.process_time()
engine = open_engine(folder)
if hasattr(engine, "_serving"):
    engine._serving
opened, opened_cpu = time.perf_counter() - started, time.process_time() - cpu
if json.loads((folder / "engine.json").read_text())["kind"] == "decoder":
    next(engine.generate([[5, 6, 7]], Sampling(max_new_tokens=2)))
else:
    engine.run({"input_ids": numpy.array([[101, 2023, 102]])})
assert engine.source == form, engine.source
print(json.dumps({"open_s": opened, "open_cpu_s": opened_cpu, "answer_s": time.perf_counter() - started,
                  "peak_bytes": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024}))
"""


def start(folder: Path, runs: int) -> dict[str, dict[str, float]]:
    """Seconds from nothing to an open engine and to its first answer, in new processes, blob and IR in turn."""
    found: dict[str, list[dict[str, float]]] = {"blob": [], "ir": []}
    environment = {**builds.environment(), "PYTHONPATH": str(inputs.ROOT)}
    for _ in range(runs):
        for form, figures in found.items():
            command = [sys.executable, "-c", START, str(folder), form]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            figures.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        form: {name: statistics.median(each[name] for each in figures) for name in figures[0]}
        for form, figures in found.items()
    }


def encoders(rounds: int) -> dict[str, Any]:
    """MiniLM in fp32 and int8 by both runtimes: sentences a second in batches of 8, and how near the embeddings are."""
    import numpy as np

    from pipeline.parity.similarity import spearman
    from pipeline.parity.stored import Stored
    from pipeline.targets import ort_engine, ov_engine

    engines: dict[str, Any] = {}
    made = {}
    for runtime in ("onnxruntime", "openvino"):
        targets: dict[str, dict[str, object]] = {name: {"precision": name} for name in ("fp32", "int8")}
        folder = inputs.model(HOME, "minilm")
        name = f"minilm-{runtime}"
        recipe = inputs.recipe(HOME, name, targets, model_folder=folder, samples=96, length=64, runtime=runtime)
        work, script = WORK / "minilm", Path(sys.executable).parent / "build"
        decode.run([script, recipe, "--quiet", "--out", work / "out", "--cache", work / "cache"])
        opener = ort_engine.open_engine if runtime == "onnxruntime" else ov_engine.open_engine
        for precision in targets:
            made[f"{runtime} {precision}"] = work / "out" / name / precision
            engines[f"{runtime} {precision}"] = opener(made[f"{runtime} {precision}"])
    (reference,) = (WORK / "minilm" / "cache" / "results").glob("reference-*/out")
    stored = Stored.open(reference)
    samples = [stored.inputs(index) for index in range(stored.samples)]
    wanted = np.stack([stored.output("sentence_embedding", index)[1] for index in range(stored.samples)])
    batches = [_padded(samples[first : first + 8]) for first in range(0, len(samples), 8)]
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        for batch in batches:
            engine.run(batch)  # warm
    for _ in range(rounds):
        for name, engine in engines.items():
            started = time.perf_counter()
            for batch in batches:
                engine.run(batch)
            speeds[name].append(len(samples) / (time.perf_counter() - started))
    rows = []
    for name, engine in engines.items():
        got = np.stack([engine.run(sample)["sentence_embedding"][0] for sample in samples])
        cosine = (got * wanted).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(wanted, axis=1)
        rows.append(
            {
                "name": name,
                "sentences_per_s": statistics.median(speeds[name]),
                "sentences_per_s_range": [min(speeds[name]), max(speeds[name])],
                "rounds": rounds,
                "cosine_mean": float(cosine.mean()),
                "cosine_min": float(cosine.min()),
                "spearman": spearman(wanted, got),
            }
        )
        print(f"{name:20} {rows[-1]['sentences_per_s']:7.1f} sentences/s  cosine {rows[-1]['cosine_mean']:.5f}")
    return {"rows": rows, "samples": len(samples), "start": start(made["openvino fp32"], rounds)}


def _padded(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    import numpy as np

    longest = max(each["input_ids"].shape[1] for each in samples)
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {
        name: np.concatenate([np.pad(s[name], ((0, 0), (0, longest - s[name].shape[1]))) for s in samples])
        for name in names
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimum-intel", type=Path, help="an interpreter with it (default: make one in .bench)")
    parser.add_argument("--parts", default="build,quality,decode,start,encoder", help="with commas between")
    parser.add_argument("--models", default=",".join(MODELS), help="with commas between")
    parser.add_argument("--runs", type=int, default=3, help="of every build")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    HOME.mkdir(exist_ok=True)
    (HOME / ".gitignore").write_text("*\n", "utf-8")
    results, parts = HOME / "openvino.json", arguments.parts.split(",")
    document = json.loads(results.read_text("utf-8")) if results.exists() else {"models": {}, "versions": {}}
    document |= {"machine": machine.describe(), "date": time.strftime("%Y-%m-%d", time.gmtime())}
    document["versions"][OURS] = environments.versions(Path(sys.executable))
    for model in arguments.models.split(","):
        figures = document["models"].setdefault(model, {})
        figures["load"] = [machine.load()]
        if "build" in parts:
            python = arguments.optimum_intel or environments.make("optimum-intel")
            document["versions"][THEIRS] = environments.versions(python)
            figures["build"] = build(model, python, arguments.runs)
        if "quality" in parts:
            figures["quality"] = quality(model)
        if "decode" in parts:
            figures["decode"] = decoding(model, arguments.rounds)
        if "start" in parts:
            figures["start"] = start(ours(model), arguments.rounds)
        figures["load"].append(machine.load())
        results.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    if "encoder" in parts:
        document["encoder"] = encoders(arguments.rounds)
        results.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    ov_page.write(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
