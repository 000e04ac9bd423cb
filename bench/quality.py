"""Judge int4 of GenAI's builder and ours by one reference: what the speed in decode.py was bought with.

    python bench/quality.py

Builds pydoc-llama with the parity data of its recipe, runs the builder's folders through the same parity stage and
writes .bench/quality.json. GenAI's graph takes and gives what ours does, so only the description of the folder is made.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import builds
import decode
import environments
import inputs
import measure

HOME = environments.HOME
MODEL = "pydoc-llama"


def build() -> tuple[Path, dict[str, dict[str, Any]]]:
    """Our int4 engines on the recipe's own held-out data; the store, and the target's part of the result by name."""
    work = HOME / "quality"
    work.mkdir(exist_ok=True)
    recipe = work / "recipe.yaml"
    targets = {
        f"int4-{size}": {
            "runtime": "onnxruntime",
            "precision": "int4",
            "quantize": {"group_size": size},
            "gates": inputs.gates_off("text-generation", "int4"),
        }
        for size in decode.GROUPS
    }
    content = {
        "name": "quality",
        "model": {"source": str(inputs.MODELS / MODEL)},
        "parity": {"data": {"path": str(inputs.DATA / "pydoc-heldout.txt")}},
        "targets": targets,
    }
    recipe.write_text(json.dumps(content, indent=1), "utf-8")
    document, script = work / "document.json", Path(sys.executable).parent / "build"
    command = f'"{script}" "{recipe}" --out out --cache cache --format json > "{document}"'
    log = HOME / "logs" / "quality.log"
    cost = measure.run(("sh", "-c", command), cwd=work, environment=builds.environment(), log=log)
    if cost.exit_code:
        raise SystemExit(f"{recipe} failed with exit code {cost.exit_code}: see {log}")
    found = json.loads(document.read_text("utf-8"))["targets"]
    return work / "cache", {each["target"]: each for each in found}


def described(folder: Path, like: Path) -> Path:
    """A builder's folder with the engine.json of ours beside it, so that the same Engine opens it."""
    copy = HOME / "quality" / "described" / folder.name
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for file in folder.glob("model.onnx*"):
        os.link(file, copy / file.name)
    engine = json.loads((like / "engine.json").read_text("utf-8"))
    engine["components"] = {"model": "model.onnx"}
    (copy / "engine.json").write_text(json.dumps(engine), "utf-8")
    return copy


def judged(folder: Path, reference: Path) -> dict[str, Any]:
    """The parity stage's report of one folder."""
    from pipeline.stages.measure import MeasureOptions, run

    out = HOME / "quality" / "reports" / folder.name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    options = MeasureOptions(opener="pipeline.targets.ort_engine:open_engine", settings={"threads": 2})
    run({"engine": folder, "reference": reference}, options, out, lambda done, total=0, note="": None)
    return dict(json.loads((out / "report.json").read_text("utf-8")))


def main() -> int:
    HOME.mkdir(exist_ok=True)
    (HOME / ".gitignore").write_text("*\n", "utf-8")
    checkpoint = inputs.model(HOME, MODEL)
    store, ours = build()
    (reference,) = (store / "results").glob("reference-*/out")
    rows = []
    for size, folder in decode.builder(MODEL, checkpoint).items():
        mine = ours[f"int4-{size}"]
        artifact = HOME / "quality" / mine["artifact"]
        report = judged(described(folder, artifact), reference)
        rows += [
            {
                "name": f"GenAI builder int4/{size}",
                "size_bytes": decode.size_bytes(folder),
                "metrics": report["metrics"],
            },
            {
                "name": f"Enginewright int4/{size}",
                "size_bytes": decode.size_bytes(artifact),
                "metrics": mine["metrics"],
            },
        ]
        samples = report["samples"]
    for row in rows:
        metrics = row["metrics"]
        print(
            f"{row['name']:24} {row['size_bytes'] / 1e6:6.2f} MB  KL {metrics['kld_mean']:.3g}  "
            f"top-1 {metrics['top1']:.3f}  perplexity ratio {metrics['perplexity_ratio']:.4f}"
        )
    (HOME / "quality.json").write_text(json.dumps({"rows": rows, "samples": samples}, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
