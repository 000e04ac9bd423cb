"""Memory and CPU time of quantizing LLM checkpoints: ours layer by layer, llm-compressor beside it.

    python bench/llm_quantize.py --model tinyllama-1.1b=FOLDER --peer PYTHON
    python bench/llm_quantize.py --model llama-2-7b=FOLDER

FOLDER holds random weights of that shape (bench/random_weights.py). PYTHON is an interpreter with llmcompressor 0.14:
it does not install beside Enginewright. Every job runs alone, in a process of its own, with the same calibration text.
Results go to .bench/llm_quantize.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import measure

ROOT = Path(__file__).parent.parent
DATA = ROOT / "recipes" / "data" / "pydoc-calibration.txt"
SAMPLES, LENGTH = 8, 128
PEER = """
import json, sys
from pathlib import Path
import torch
from compressed_tensors.offload import dispatch_model  # noqa: F401  fails early where the environment is not the peer's
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.{module} import {modifier}
from transformers import AutoModelForCausalLM, AutoTokenizer

if not torch.accelerator.is_available():  # its AWQ pins memory for a device, and fails where there is none
    torch.Tensor.pin_memory = lambda tensor, *place: tensor
source, out, ids = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
recipe = [{modifier}(targets=["Linear"], scheme="{scheme}", ignore=["lm_head"])]
told = dict(model=model, recipe=recipe)
if {calibrates}:
    rows = json.loads(Path(ids).read_text())
    data = Dataset.from_dict({{"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}})
    told |= dict(dataset=data, num_calibration_samples=len(rows), max_seq_length=len(rows[0]))
oneshot(**told)
model.save_pretrained(out, save_compressed=True)
AutoTokenizer.from_pretrained(source).save_pretrained(out)
"""
MODIFIERS = {
    "rtn": ("quantization", "QuantizationModifier"),
    "awq": ("awq", "AWQModifier"),
    "gptq": ("gptq", "GPTQModifier"),
}


def job(place: Path, stage: str, options: str, told: dict[str, Any], inputs: dict[str, Path]) -> list[str]:
    """A job of the worker, as the build starts it."""
    place.mkdir(parents=True, exist_ok=True)
    document = {
        "stage": stage,
        "options_type": options,
        "options": told,
        "inputs": {role: str(path) for role, path in inputs.items()},
        "out": str(place / "out"),
    }
    (place / "job.json").write_text(json.dumps(document))
    return [sys.executable, "-m", "pipeline.run.worker", str(place / "job.json")]


def scheme(method: str) -> dict[str, Any]:
    """W4A16, symmetric, groups of 128."""
    return {"layout": "w4a16", "dtype": "bf16", "method": method, "group_size": 128, "symmetric": True}


def ours(model: Path, method: str, scratch: Path, samples: int, length: int) -> measure.Cost:
    """Quantize with the stages of the build; AWQ's observation is in it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    place, log = scratch / f"ours-{method}", scratch / f"ours-{method}.log"
    shutil.rmtree(place, ignore_errors=True)
    text = scratch / "text"
    text.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(DATA, text / "data.txt")
    inputs, total = {"model": model}, None
    if method == "awq":
        told: dict[str, Any] = {"samples": samples, "length": length}
        module = "pipeline.stages.llm.observe"
        command = job(
            place / "observed", f"{module}:STAGE", f"{module}:ObserveOptions", told, {**inputs, "calibration": text}
        )
        total = measure.run(command, cwd=scratch, environment=environment, log=log)
        inputs["observed"] = place / "observed" / "out"
    if method == "gptq":
        inputs["calibration"] = text
    module = "pipeline.stages.llm.quantize"
    told = {"scheme": scheme(method), "samples": samples, "length": length}
    command = job(place / "quantized", f"{module}:STAGE", f"{module}:QuantizeOptions", told, inputs)
    cost = measure.run(command, cwd=scratch, environment=environment, log=log)
    return cost if total is None else total + cost


def theirs(python: str, model: Path, method: str, scratch: Path, samples: int, length: int) -> measure.Cost:
    """llm-compressor's oneshot on the same token ids."""
    from pipeline.stages import samples as text

    scratch.mkdir(parents=True, exist_ok=True)
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    (scratch / "ids.json").write_text(
        json.dumps(text.windows(DATA, text.load_encoder(model, vocab), samples, length).tolist())
    )
    module, modifier = MODIFIERS[method]
    code = PEER.format(module=module, modifier=modifier, scheme="W4A16", calibrates=method != "rtn")
    (scratch / f"peer-{method}.py").write_text(code)
    out = scratch / f"peer-{method}"
    shutil.rmtree(out, ignore_errors=True)
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [python, str(scratch / f"peer-{method}.py"), str(model), str(out), str(scratch / "ids.json")]
    return measure.run(command, cwd=scratch, environment=environment, log=scratch / f"peer-{method}.log")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--peer", help="an interpreter with llmcompressor")
    parser.add_argument("--methods", nargs="+", default=["rtn", "awq"], choices=sorted(MODIFIERS))
    parser.add_argument(
        "--peer-methods", nargs="+", default=["rtn"], choices=sorted(MODIFIERS),
        help="of the peer: on two cores its AWQ takes an hour and more for 1.1B",
    )  # fmt: skip
    parser.add_argument("--scratch", type=Path, default=ROOT / ".bench" / "llm")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--length", type=int, default=LENGTH)
    arguments = parser.parse_args()
    name, _, folder = arguments.model.partition("=")
    scratch = (arguments.scratch / name).absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    place = ROOT / ".bench" / "llm_quantize.json"
    found: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {}
    for method in arguments.methods:
        told = (method, scratch, arguments.samples, arguments.length)
        costs = {"enginewright": ours(Path(folder), *told)}
        if arguments.peer and method in arguments.peer_methods:
            costs["llm-compressor"] = theirs(arguments.peer, Path(folder), *told)
        for tool, cost in costs.items():
            found.setdefault(name, {}).setdefault(method, {})[tool] = vars(cost)
            print(
                f"{name} {method} {tool}: {cost.cpu_s:.0f} CPU s, {cost.wall_s:.0f} s, "
                f"peak {cost.peak_bytes / 2**30:.2f} GiB, exit code {cost.exit_code}",
                flush=True,
            )
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
