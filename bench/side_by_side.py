"""A recipe of four targets, one step at a time and two side by side: wall time of a build from an empty store.

`python bench/side_by_side.py [--rounds N] [--threads N] [--recipe FILE]`, rounds alternating between the two, each
after the other, so that a busy machine spoils both alike. `--threads` fixes the threads of every step in both
(OMP_NUM_THREADS); without it a step alone gets all cores and two side by side half each. Prints a JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPE = f"""\
name: four
model:
  source: {ROOT / "recipes/models/pydoc-llama"}
  license: PSF-2.0
parity:
  data:
    path: {ROOT / "recipes/data/pydoc-heldout.txt"}
    samples: 8
    length: 128
targets:
  ort-int8: {{runtime: onnxruntime, precision: int8}}
  ort-int4: {{runtime: onnxruntime, precision: int4, quantize: {{group_size: 32}}}}
  ov-int8: {{runtime: openvino, precision: int8}}
  gguf-q8: {{runtime: gguf, precision: Q8_0}}
"""


def built(recipe: Path, place: Path, jobs: int, threads: int | None) -> dict[str, Any]:
    """One build into an empty store: wall seconds, the steps that ran and what they took, and what came out."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    place.mkdir()
    argv = [str(Path(sys.executable).with_name("build")), str(recipe), "--cache", str(place / "cache")]
    argv += ["--out", str(place / "out"), "--jobs", str(jobs), "--events", str(place / "events"), "--format", "json"]
    started = time.monotonic()
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    wall = time.monotonic() - started
    if done.returncode:
        sys.exit(done.stderr)
    events = [json.loads(line) for line in (place / "events").read_text("utf-8").splitlines()]
    ends = [event for event in events if event["event"] == "done"]
    return {
        "wall_s": round(wall, 2),
        "steps": {event["step"]: event["wall_s"] for event in ends},
        "cpu_s": round(sum(event["cpu_s"] for event in ends), 1),
        "ids": {each["target"]: each["artifact_id"] for each in json.loads(done.stdout)["targets"]},
        "once": len({event["key"] for event in ends}) == len(ends),
    }


def main() -> None:
    """Measure in pairs and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--recipe", type=Path)
    asked = parser.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        recipe = asked.recipe or Path(name) / "recipe.yaml"
        if asked.recipe is None:
            recipe.write_text(RECIPE, "utf-8")
        for number in range(asked.rounds):
            pair = {jobs: built(recipe, Path(name) / f"{number}-{jobs}", jobs, asked.threads) for jobs in (1, 2)}
            pairs.append(pair)
    ratios = [round(pair[2]["wall_s"] / pair[1]["wall_s"], 3) for pair in pairs]
    document = {
        "threads": asked.threads or "divided",
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
        "wall_s": [{jobs: run["wall_s"] for jobs, run in pair.items()} for pair in pairs],
        "cpu_s": [{jobs: run["cpu_s"] for jobs, run in pair.items()} for pair in pairs],
        "every_step_once": all(run["once"] for pair in pairs for run in pair.values()),
        "same_ids": all(pair[1]["ids"] == pair[2]["ids"] for pair in pairs),
        "steps_s": pairs[-1][1]["steps"],
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
