"""One engine of the decode benchmark in a process of its own: load, say so, then answer `go` on standard input.

    python decode_child.py KIND FOLDER --prompt 128 --new 64 --threads 2

KIND is torch, genai, openvino_genai or engine.
For every `go` one JSON line: {"tokens_per_s", "first_token_s", "cpu_s_per_token"}; at
the end of the input {"peak_bytes"}. A round of a fast model is repeated until half a second has passed. The prompt's
ids are drawn by a seed, so every engine gets the same.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

Generate = Callable[[], tuple[float, float, float]]
"""Runs once; seconds to the first token, and of all later ones seconds and CPU seconds."""
ROUND_S = 0.5


def prompt_ids(folder: Path, count: int) -> list[int]:
    """Ids of ordinary tokens; the tokenizer of the benchmark models has 4096."""
    drawn = random.Random(0)
    vocabulary = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    return [drawn.randrange(300, min(vocabulary, 4000)) for _ in range(count)]


def torch_eager(folder: Path, ids: list[int], new: int, threads: int) -> Generate:
    """The checkpoint in torch, fp32, with transformers' own cache."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate() -> tuple[float, float, float]:
        with torch.inference_mode():
            started = time.perf_counter()
            answer = model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)
            token = answer.logits[:, -1].argmax(-1, keepdim=True)
            first, cpu = time.perf_counter(), time.process_time()
            for _ in range(new - 1):
                answer = model(input_ids=token, past_key_values=answer.past_key_values, use_cache=True)
                token = answer.logits[:, -1].argmax(-1, keepdim=True)
            return first - started, time.perf_counter() - first, time.process_time() - cpu

    return generate


def genai(folder: Path, ids: list[int], new: int, threads: int) -> Generate:
    """A folder in ONNX Runtime GenAI. Its genai_config.json has been given the threads."""
    import onnxruntime_genai as og

    told = json.loads((folder / "genai_config.json").read_text("utf-8"))
    if told["model"]["decoder"]["session_options"].get("intra_op_num_threads") != threads:
        raise SystemExit(f"{folder}: genai_config.json asks for another number of threads")
    model = og.Model(str(folder))

    def generate() -> tuple[float, float, float]:
        parameters = og.GeneratorParams(model)
        total = len(ids) + new
        parameters.set_search_options(do_sample=False, max_length=total, min_length=total)
        started = time.perf_counter()
        generator = og.Generator(model, parameters)
        generator.append_tokens(ids)
        generator.generate_next_token()
        first, cpu = time.perf_counter(), time.process_time()
        for _ in range(new - 1):
            generator.generate_next_token()
        return first - started, time.perf_counter() - first, time.process_time() - cpu

    return generate


def openvino_genai(folder: Path, ids: list[int], new: int, threads: int) -> Generate:
    """A folder in OpenVINO GenAI's LLMPipeline. GenAI measures the first token; CPU time is shared out by wall time."""
    import numpy as np
    import openvino
    import openvino_genai as og

    pipeline = og.LLMPipeline(str(folder), "CPU", INFERENCE_NUM_THREADS=threads)
    config = og.GenerationConfig(max_new_tokens=new, min_new_tokens=new, ignore_eos=True, do_sample=False)
    prompt = openvino.Tensor(np.array([ids], np.int64))

    def generate() -> tuple[float, float, float]:
        started, cpu = time.perf_counter(), time.process_time()
        found = pipeline.generate(prompt, config)
        total, cpu = time.perf_counter() - started, time.process_time() - cpu
        if len(found.tokens[0]) != new:
            raise SystemExit(f"{folder}: {len(found.tokens[0])} tokens instead of {new}")
        first = found.perf_metrics.get_ttft().mean / 1000
        return first, total - first, cpu * (total - first) / total

    return generate


def engine(folder: Path, ids: list[int], new: int, threads: int) -> Generate:
    """A folder in Enginewright's own Engine."""
    from pipeline.engine import Sampling
    from pipeline.targets import ort_engine, ov_engine

    runtime = json.loads((folder / "engine.json").read_text("utf-8"))["runtime"]
    # OpenVINO takes all processors; to ask for a number of threads is to ask for another blob.
    opened = (
        ort_engine.open_engine(folder, {"threads": threads})
        if runtime == "onnxruntime"
        else ov_engine.open_engine(folder)
    )
    sampling = Sampling(max_new_tokens=new, eos_token_ids=())

    def generate() -> tuple[float, float, float]:
        started = time.perf_counter()
        tokens = opened.generate([ids], sampling)
        next(tokens)
        first, cpu = time.perf_counter(), time.process_time()
        count = 1 + sum(1 for _ in tokens)
        if count != new:
            raise SystemExit(f"{folder}: {count} tokens instead of {new}")
        return first - started, time.perf_counter() - first, time.process_time() - cpu

    return generate


KINDS = {"torch": torch_eager, "genai": genai, "openvino_genai": openvino_genai, "engine": engine}


def one_round(generate: Generate, new: int) -> dict[str, float]:
    """Means over as many repetitions as the round has time for."""
    first_s, rest_s, cpu_s, count = 0.0, 0.0, 0.0, 0
    while not count or first_s + rest_s < ROUND_S:
        first, rest, cpu = generate()
        first_s, rest_s, cpu_s, count = first_s + first, rest_s + rest, cpu_s + cpu, count + 1
    tokens = count * (new - 1)
    return {
        "tokens_per_s": tokens / rest_s,
        "first_token_s": first_s / count,
        "cpu_s_per_token": cpu_s / tokens,
    }


def peak_bytes() -> int:
    """Peak memory of this program. The kernel's own count by rusage begins with what the harness held at the fork."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text("utf-8").split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    ids = prompt_ids(arguments.folder, arguments.prompt)
    generate = KINDS[arguments.kind](arguments.folder, ids, arguments.new, arguments.threads)
    generate()  # warm: pages, thread pools, packed weights
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        if line.strip() == "go":
            print(json.dumps(one_round(generate, arguments.new)), flush=True)
    print(json.dumps({"peak_bytes": peak_bytes()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
