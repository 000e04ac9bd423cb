"""Measure builds: Enginewright beside Olive, Optimum and ONNX Runtime GenAI's builder, in one run on one machine.

    python bench/builds.py                              all jobs, three times each, then docs/benchmarks.md
    python bench/builds.py --jobs start,tiny-bert --runs 1
    python bench/builds.py --olive PYTHON --optimum PYTHON    use environments that exist

Run it with the interpreter in which Enginewright is installed. Repetitions of the tools alternate, so that a busy
machine is busy for all of them. Figures go to .bench/builds.json, logs to .bench/logs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import environments
import inputs
import jobs
import machine
import measure
from jobs import OURS, Attempt, Interpreters, Job

HOME = environments.HOME
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "numpy")
INT8: dict[str, object] = {"precision": "int8"}


def steps(text: str) -> dict[str, dict[str, float]]:
    """What each step of a build took, from its NDJSON events: label -> {cpu_s, wall_s, peak_bytes}.

    Steps that came from the store are not in it.
    """
    return {
        event["step"]: {"cpu_s": event["cpu_s"], "wall_s": event["wall_s"], "peak_bytes": event["peak_rss_bytes"]}
        for event in map(json.loads, text.splitlines())
        if event["event"] == "done"
    }


def heavy_imports(log: str) -> list[str]:
    """Which of the heavy packages a run under PYTHONPROFILEIMPORTTIME imported, from its standard error."""
    found = set(re.findall(r"^import time:[^|]*\|[^|]*\|\s*(\w+)$", log, re.MULTILINE))
    return [name for name in HEAVY if name in found]


def environment() -> dict[str, str]:
    """For every command alike: no network, no telemetry, nothing of the user's caches."""
    names = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return {
        **kept,
        "HF_HOME": str(HOME / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OLIVE_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def attempt(job: Job, one: Attempt, repetition: int) -> dict[str, Any]:
    """Run the phases of one tool once, in a new workspace; {phase: {"cost": Cost, ...}}."""
    work = jobs.workspace(HOME / "work" / job.id, one.tool)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    found: dict[str, Any] = {}
    for phase in one.phases:
        log = HOME / "logs" / job.id / f"{work.name}-{phase.name}-{repetition}.log"
        log.unlink(missing_ok=True)
        place = work / phase.folder
        place.mkdir(exist_ok=True)
        cost = measure.Cost(0, 0, 0, 0)
        for command in phase.commands:
            cost += measure.run(command, cwd=place, environment=environment(), log=log)
        entry: dict[str, Any] = {"cost": cost}
        if one.outputs:
            entry["disk_bytes"] = measure.disk_bytes([place], [HOME / "inputs"])
            entry["output_bytes"] = measure.disk_bytes([place / name for name in one.outputs])
        if one.tool == OURS and (place / "events.ndjson").exists():
            entry["steps"] = steps((place / "events.ndjson").read_text("utf-8"))
        found[phase.name] = entry
        print(
            f"{job.id:20} {one.tool:14} {phase.name:6} {cost.cpu_s:7.2f} CPU s {cost.wall_s:7.1f} s "
            f"{cost.peak_bytes / 1e6:7.0f} MB  exit {cost.exit_code}",
            flush=True,
        )
    if one.tool == OURS and any(phase.name == "warm" for phase in one.phases) and repetition == 0:
        warm = next(phase for phase in one.phases if phase.name == "warm")
        log = HOME / "logs" / job.id / "imports.log"
        log.unlink(missing_ok=True)
        # A build with all in the store; it follows `edit`, whose results the first recipe shares but for one.
        traced = {**environment(), "PYTHONPROFILEIMPORTTIME": "1"}
        cost = measure.run(warm.commands[0], cwd=work / warm.folder, environment=traced, log=log)
        found["warm"]["imports"] = heavy_imports(log.read_text("utf-8", "replace"))
        found["warm"]["imports_exit_code"] = cost.exit_code
    return found


def gather(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The medians of all repetitions of one tool, by phase."""
    phases: dict[str, Any] = {}
    for name in found[0]:
        entries = [each[name] for each in found]
        figures = measure.median([entry["cost"] for entry in entries])
        for extra in ("disk_bytes", "output_bytes", "imports", "steps"):
            if extra in entries[0]:
                figures[extra] = entries[0][extra]
        phases[name] = figures
    return phases


def all_jobs(tools: Interpreters) -> dict[str, Job]:
    """Every job by its id; makes nothing but recipes."""
    bert, lm = HOME / "inputs" / "tiny-bert", HOME / "inputs" / "minilm"

    def recipe(name: str, targets: jobs.Targets, folder: Path, samples: int, length: int) -> Path:
        return inputs.recipe(HOME, name, targets, model_folder=folder, samples=samples, length=length)

    # tiny-bert's weights are random, so how close an engine comes to them is not judged.
    off = {each: {"gates": inputs.gates_off("text-classification", each)} for each in ("fp32", "int8")}
    random: jobs.Targets = {"cpu-int8": {**INT8, **off["int8"]}}
    three: jobs.Targets = {
        "fp32": {"precision": "fp32", **off["fp32"]},
        "int8-a": {**INT8, **off["int8"]},
        "int8-b": {**jobs.OTHER_INT8, **off["int8"]},
    }

    found = [
        jobs.start(tools),
        jobs.encoder(
            tools,
            HOME,
            "tiny-bert",
            bert,
            "text-classification",
            recipe("tiny-bert", random, bert, 32, 64),
        ),
        jobs.encoder(tools, HOME, "minilm", lm, "feature-extraction", recipe("minilm", {"cpu-int8": INT8}, lm, 64, 64)),
        jobs.three_targets(tools, HOME, bert, "text-classification", recipe("tiny-bert-three", three, bert, 32, 64)),
    ]
    for name in ("pydoc-llama", "mid-llama", "qwen2.5-0.5b-shape"):
        folder = HOME / "inputs" / name
        for precision in ("fp32", "int4") if name != "qwen2.5-0.5b-shape" else ("int4",):
            target: jobs.Targets = {f"cpu-{precision}": {"precision": precision}}
            if name != "pydoc-llama":  # random weights: how close int4 comes says nothing, and is not judged
                target[f"cpu-{precision}"]["gates"] = inputs.gates_off("text-generation", precision)
            path = recipe(f"{name}-{precision}", target, folder, 4, 64)
            found.append(jobs.decoder(tools, name, precision, folder, path))
    return {job.id: job for job in found}


MODELS = {"tiny-bert": "tiny-bert", "three": "tiny-bert", "minilm": "minilm"}


def model_of(job: str) -> str | None:
    """Which checkpoint a job needs."""
    if job == "start":
        return None
    return MODELS.get(job, job.rsplit("-", 1)[0])


def parity(tools: Interpreters) -> list[dict[str, Any]]:
    """What `build --format json` says of the recipes that ship, from an empty cache."""
    found = []
    for name in ("tiny-llama", "minilm"):
        work = HOME / "work" / f"parity-{name}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        document, script = work / "document.json", tools.tool(tools.ours, "build")
        recipe = inputs.ROOT / "recipes" / f"{name}.yaml"
        command = f'"{script}" "{recipe}" --out out --cache cache --format json > "{document}"'
        log = HOME / "logs" / f"parity-{name}.log"
        cost = measure.run(("sh", "-c", command), cwd=work, environment=environment(), log=log)
        if cost.exit_code:
            raise SystemExit(f"recipes/{name}.yaml failed with exit code {cost.exit_code}: see {log}")
        found.append(json.loads(document.read_text("utf-8")))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default="", help="ids with commas between; default: all")
    parser.add_argument("--runs", type=int, default=3, help="repetitions of each job (default 3)")
    parser.add_argument("--olive", type=Path, help="an interpreter with Olive (default: make .bench/olive)")
    parser.add_argument("--optimum", type=Path, help="an interpreter with optimum-onnx (default: make .bench/optimum)")
    parser.add_argument("--without", default="", help="tools to leave out, with commas between")
    parser.add_argument(
        "--no-parity", action="store_true", help="do not build the shipped recipes for the parity table"
    )
    arguments = parser.parse_args()
    left_out = {name.strip() for name in arguments.without.split(",") if name.strip()}
    if unknown := left_out - set(jobs.TOOLS):
        parser.error(f"unknown tools: {', '.join(sorted(unknown))}; there are {', '.join(jobs.TOOLS)}")
    HOME.mkdir(exist_ok=True)
    (HOME / ".gitignore").write_text("*\n", "utf-8")
    tools = Interpreters(
        ours=Path(sys.executable),
        olive=arguments.olive or (Path() if jobs.OLIVE in left_out else environments.make("olive")),
        optimum=arguments.optimum or (Path() if jobs.OPTIMUM in left_out else environments.make("optimum")),
    )
    known = all_jobs(tools)
    chosen = [name.strip() for name in arguments.jobs.split(",") if name.strip()] or list(known)
    if wrong := [name for name in chosen if name not in known]:
        parser.error(f"unknown jobs: {', '.join(wrong)}; there are {', '.join(known)}")
    for name in chosen:
        if needed := model_of(name):
            inputs.model(HOME, needed)

    results = HOME / "builds.json"
    document = json.loads(results.read_text("utf-8")) if results.exists() else {"jobs": {}}
    document["versions"] = {
        tool: environments.versions(python)
        for tool, python in ((OURS, tools.ours), (jobs.OLIVE, tools.olive), (jobs.OPTIMUM, tools.optimum))
        if tool not in left_out
    }
    for name in chosen:
        job, before, started = known[name], machine.load(), time.strftime("%Y-%m-%d", time.gmtime())
        attempts = [one for one in job.attempts(HOME / "work" / job.id) if one.tool not in left_out]
        found: dict[str, list[dict[str, Any]]] = {one.tool: [] for one in attempts}
        for repetition in range(arguments.runs):
            for one in attempts:
                found[one.tool].append(attempt(job, one, repetition))
        document["jobs"][name] = {
            "title": job.title,
            "note": job.note,
            "missing": dict(job.missing),
            "date": started,
            "load": [before, machine.load()],
            "parameters": inputs.parameters(HOME / "inputs" / needed) if (needed := model_of(name)) else 0,
            "commands": {
                one.tool: {phase.name: [machine.shown(command) for command in phase.commands] for phase in one.phases}
                for one in attempts
            },
            "tools": {tool: gather(each) for tool, each in found.items()},
        }
        document["machine"] = machine.describe()
        results.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
        for one in attempts:
            shutil.rmtree(jobs.workspace(HOME / "work" / job.id, one.tool), ignore_errors=True)
    if not arguments.no_parity:
        document["parity"] = parity(tools)
        results.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(f"figures: {results}\nnext: python bench/page.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
