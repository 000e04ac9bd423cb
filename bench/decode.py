"""Measure decoding: tokens/s, time to the first token and peak memory of int4 engines beside torch, in one run.

    python bench/decode.py                       pydoc-llama and the shape of Qwen2.5-0.5B, five rounds
    python bench/decode.py --models pydoc-llama --rounds 3

Every engine is loaded in a process of its own and stays loaded; in each round they run one after the other, so that a
busy machine is busy for all of them. All get the same threads: GenAI's builder writes a configuration with one thread,
and the copy that is measured here says how many. Figures go to .bench/decode.json.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import builds
import environments
import inputs
import machine

HOME = environments.HOME
GROUPS = (32, 128)


@dataclass(frozen=True)
class Variant:
    """An engine to measure."""

    name: str
    kind: str
    folder: Path


def run(command: Sequence[str | Path]) -> None:
    """A build, with its output in the log."""
    log = HOME / "logs" / "decode.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as handle:
        done = subprocess.run(command, env=builds.environment(), stdout=handle, stderr=handle)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\nfailed with exit code {done.returncode}: see {log}")


def ours(model: str, checkpoint: Path) -> dict[int, Path]:
    """Build int4 with each group size; the artifacts' folders."""
    gates = inputs.gates_off("text-generation", "int4")
    targets: dict[str, dict[str, object]] = {
        f"int4-{size}": {"precision": "int4", "quantize": {"group_size": size}, "gates": gates} for size in GROUPS
    }
    recipe = inputs.recipe(HOME, f"decode-{model}", targets, model_folder=checkpoint, samples=2, length=32)
    work, script = HOME / "decode", Path(sys.executable).parent / "build"
    run([script, recipe, "--quiet", "--out", work / "out", "--cache", work / "cache"])
    return {size: work / "out" / f"decode-{model}" / f"int4-{size}" for size in GROUPS}


def builder(model: str, checkpoint: Path) -> dict[int, Path]:
    """GenAI's own builder, with each block size."""
    made = {}
    for size in GROUPS:
        folder = HOME / "decode" / "builder" / f"{model}-{size}"
        if not (folder / "genai_config.json").exists():
            command: list[str | Path] = [
                sys.executable,
                "-m",
                "onnxruntime_genai.models.builder",
                "-i",
                checkpoint,
                "-o",
                folder,
            ]
            command += ["-p", "int4", "-e", "cpu", "-c", HOME / "decode" / "builder-cache"]
            command += ["--extra_options", f"block_size={size}"]
            run(command)
        made[size] = folder
    return made


def with_threads(folder: Path, threads: int, checkpoint: Path) -> Path:
    """A copy of a GenAI folder (its large files linked) whose configuration names the threads."""
    copy = HOME / "decode" / "threads" / "-".join(folder.parts[-2:])
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for file in folder.iterdir():
        if file.is_file() and file.name != "genai_config.json":
            os.link(file.resolve(), copy / file.name)
    if not (copy / "config.json").exists():
        shutil.copyfile(checkpoint / "config.json", copy / "config.json")
    config = json.loads((folder / "genai_config.json").read_text("utf-8"))
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    (copy / "genai_config.json").write_text(json.dumps(config, indent=1), "utf-8")
    return copy


def variants(model: str, threads: int) -> list[Variant]:
    """torch, the builder's engines in GenAI, ours in GenAI and in our Engine."""
    checkpoint = inputs.model(HOME, model)
    built, theirs = ours(model, checkpoint), builder(model, checkpoint)
    found = [Variant("torch eager, fp32", "torch", checkpoint)]
    for size in GROUPS:
        found += [
            Variant(f"GenAI builder int4/{size} in GenAI", "genai", with_threads(theirs[size], threads, checkpoint)),
            Variant(f"Enginewright int4/{size} in GenAI", "genai", with_threads(built[size], threads, checkpoint)),
            Variant(f"Enginewright int4/{size} in its Engine", "engine", built[size]),
        ]
    return found


class Child:
    """A loaded engine that waits for its turn."""

    def __init__(self, variant: Variant, prompt: int, new: int, threads: int) -> None:
        self.variant = variant
        script = str(Path(__file__).with_name("decode_child.py"))
        command = [sys.executable, script, variant.kind, str(variant.folder)]
        command += ["--prompt", str(prompt), "--new", str(new), "--threads", str(threads)]
        environment = {**builds.environment(), "PYTHONPATH": str(inputs.ROOT), "OMP_NUM_THREADS": str(threads)}
        log = (HOME / "logs" / "decode.log").open("ab")
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        log.close()
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print too
                return dict(json.loads(line))
        raise SystemExit(f"{self.variant.name} ended with exit code {self._process.wait()}")

    def go(self) -> dict[str, Any]:
        """One round."""
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> int:
        """Peak memory of the process, in bytes."""
        assert self._process.stdin
        self._process.stdin.close()
        peak = int(self._answer()["peak_bytes"])
        self._process.wait()
        return peak


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median and range of what the rounds measured."""
    figures: dict[str, Any] = {"rounds": len(rounds)}
    for name in ("tokens_per_s", "first_token_s", "cpu_s_per_token"):
        values = [each[name] for each in rounds]
        figures[name] = statistics.median(values)
        figures[f"{name}_range"] = [min(values), max(values)]
    return figures


def size_bytes(folder: Path) -> int:
    """The weights and graphs of an engine."""
    kept = (".onnx", ".data", ".safetensors")
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in kept)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="pydoc-llama,qwen2.5-0.5b-shape", help="with commas between")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    HOME.mkdir(exist_ok=True)
    (HOME / ".gitignore").write_text("*\n", "utf-8")
    results = HOME / "decode.json"
    document = json.loads(results.read_text("utf-8")) if results.exists() else {"models": {}}
    document["machine"] = machine.describe()
    document["versions"] = environments.versions(Path(sys.executable))
    for model in arguments.models.split(","):
        found, before = variants(model, arguments.threads), machine.load()
        children = [Child(each, arguments.prompt, arguments.new, arguments.threads) for each in found]
        measured: list[list[dict[str, Any]]] = [[] for _ in children]
        for _ in range(arguments.rounds):
            for child, rounds in zip(children, measured, strict=True):
                rounds.append(child.go())
        rows = []
        for child, rounds in zip(children, measured, strict=True):
            row = {"name": child.variant.name, **summary(rounds), "peak_bytes": child.end()}
            row["size_bytes"] = size_bytes(child.variant.folder)
            rows.append(row)
            print(
                f"{model:20} {row['name']:40} {row['tokens_per_s']:8.1f} tokens/s {row['first_token_s'] * 1e3:8.1f} ms "
                f"{row['cpu_s_per_token'] * 1e3:8.2f} CPU ms/token {row['peak_bytes'] / 1e6:6.0f} MB",
                flush=True,
            )
        document["models"][model] = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "load": [before, machine.load()],
            "prompt": arguments.prompt,
            "new": arguments.new,
            "threads": arguments.threads,
            "parameters": inputs.parameters(HOME / "inputs" / model),
            "rows": rows,
        }
        results.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(f"figures: {results}\nnext: python bench/page.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
