"""A model that is larger than memory: int4 for ONNX Runtime and OpenVINO, and Olive's attempt at the same.

    python bench/random_weights.py --preset llama-2-7b FOLDER
    python bench/large.py --model FOLDER [--olive PYTHON]

First a draft, then the build over the same store, which proves it, with the peak memory of every step; two samples and
two prompts prove it, for a forward pass of a 7B takes half a minute here. What ended well in .bench/large is not
repeated. Figures go to .bench/large.json, and the section of docs/benchmarks.md is written anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import builds
import environments
import inputs
import machine
import measure
import sections
from tables import megabytes, table

WORK = environments.HOME / "large"


def recipe(model: Path) -> Path:
    """Both targets; the gates are off, for the weights are random."""
    gates = inputs.gates_off("text-generation", "int4")
    content = {
        "name": "large",
        "model": {"source": str(model)},
        "parity": {
            "data": {"path": str(inputs.DATA / "pydoc-heldout.txt"), "samples": 2, "length": 64},
            "prompt_count": 2,
            "new_tokens": 4,
        },
        "targets": {
            "ort": {"runtime": "onnxruntime", "precision": "int4", "gates": gates},
            "ov": {"runtime": "openvino", "precision": "int4", "gates": gates},
        },
    }
    path = WORK / "recipe.yaml"
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return path


def ours(model: Path, verb: str) -> dict[str, Any]:
    """What `draft` or `build` took, whole and by step, and the disk in use after it."""
    done = WORK / f"{verb}.json"
    if not done.exists():
        script = str(Path(sys.executable).with_name("enginewright"))
        command = [script, verb, str(recipe(model)), "--quiet", "--jobs", "1", "--memory", "30GB"]
        command += ["--cache", str(WORK / "cache"), "--out", str(WORK / verb), "--events", str(WORK / "events")]
        cost = measure.run(command, cwd=WORK, environment=builds.environment(), log=WORK / "log")
        if cost.exit_code:
            raise SystemExit(f"{verb} ended with {cost.exit_code}: see {WORK / 'log'}")
        disk = [measure.disk_bytes(each, [model]) for each in ([WORK / "cache", WORK / verb], [WORK / verb])]
        found = {**vars(cost), "disk_bytes": disk, "steps": builds.steps((WORK / "events").read_text("utf-8"))}
        done.write_text(json.dumps(found), "utf-8")
    return dict(json.loads(done.read_text("utf-8")))


def olive(python: Path, model: Path) -> dict[str, Any]:
    """Olive's model builder for int4. Should memory end, the kernel is told to end this process and no other."""
    out = WORK / "olive"
    shutil.rmtree(out, ignore_errors=True)
    command = f'echo 1000 > /proc/self/oom_score_adj; exec "{python.parent / "olive"}" capture-onnx-graph '
    command += f'-m "{model}" --use_model_builder --precision int4 -o "{out}"'
    log = WORK / "olive.log"
    log.unlink(missing_ok=True)
    cost = measure.run(("sh", "-c", command), cwd=WORK, environment=builds.environment(), log=log)
    made = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.is_dir() else 0
    shutil.rmtree(out, ignore_errors=True)
    return {**vars(cost), "made_bytes": made}


def section(document: Mapping[str, Any]) -> str:
    """The page's section."""
    told, disk = document["machine"], [megabytes(each) for each in document["draft"]["disk_bytes"]]
    rows = []
    for verb in ("draft", "build"):
        found = document[verb]
        parts = {**found["steps"], f"`{verb}`, the whole command": found}
        for step, row in parts.items():
            figures = (f"{row['cpu_s']:.0f}", f"{row['wall_s']:.0f}", megabytes(row["peak_bytes"]))
            rows.append([verb, step, *figures])
    lines = [
        "## A 7B on a machine of 24 GB",
        "",
        f"Measured by `bench/large.py` on {document['date']}, {told['processors']} processors of {told['arch']}, "
        f"{told['memory_gb']} GB: a Llama of {document['parameters'] / 1e9:.1f} billion random weights, "
        f"{document['size_bytes'] / 1e9:.1f} GB in bf16, to int4 for ONNX Runtime and OpenVINO. `draft` makes the "
        f"engines and leaves {disk[0]} MB on the disk, of which {disk[1]} MB are they; `build`, after it, proves them. "
        "The reference, in torch and fp32, reads a layer at a time; it would hold 27 GB otherwise. The parity steps "
        "are the runtimes' own memory.",
        "",
        table(("", "step", "CPU s", "wall s", "peak MB"), rows, right=2),
        "",
    ]
    if peer := document.get("olive"):
        end = {0: "ended well", -9: "was killed when memory ended"}.get(
            peer["exit_code"], f"ended with exit code {peer['exit_code']}"
        )
        lines += [
            "Olive's attempt at int4 for ONNX Runtime "
            "(`olive capture-onnx-graph --use_model_builder --precision int4`) "
            f"{end} after {peer['cpu_s']:.0f} CPU s and {peer['wall_s']:.0f} s, with a peak of "
            f"{megabytes(peer['peak_bytes'])} MB, and left {megabytes(peer['made_bytes'])} MB.",
            "",
        ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--olive", type=Path, help="an interpreter with Olive (default: make .bench/olive)")
    parser.add_argument("--without-olive", action="store_true")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    results, model = environments.HOME / "large.json", arguments.model.absolute()
    document: dict[str, Any] = json.loads(results.read_text("utf-8")) if results.exists() else {}
    document |= {
        "machine": machine.describe(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "parameters": inputs.parameters(model),
        "size_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        **{verb: ours(model, verb) for verb in ("draft", "build")},
    }
    results.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    if not arguments.without_olive:
        os.sync()
        document["olive"] = olive(arguments.olive or environments.make("olive"), model)
        results.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    sections.put("large", section(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
