"""Speed through HTTP: `enginewright serve` in a process of its own, and so many streams at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.bench.run import ROOT
from pipeline.errors import StageError, UnavailableError
from pipeline.frozen import frozen

START_S = 600.0


@frozen
class Load:
    """What is asked of the server."""

    streams: int
    requests: int
    prompt: int
    new: int


def _options(artifact: Path) -> list[str]:
    """Our own server takes a free port and says which; another has to be told one."""
    from pipeline.serve.external import framework_of

    file = artifact / "manifest.json"
    if not file.is_file() or framework_of(json.loads(file.read_bytes())) == "enginewright":
        return ["--port", "0", "--queue", "4096"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return ["--port", str(free.getsockname()[1])]


@contextlib.contextmanager
def serving(artifact: Path) -> Iterator[str]:
    """The address of a server that is ready."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))}
    command = [
        sys.executable,
        "-P",
        "-m",
        "pipeline.cli.main",
        "serve",
        str(artifact),
        *_options(artifact),
    ]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            until = time.monotonic() + START_S
            while True:
                log.seek(0)
                said = log.read()
                if " is served at " in said:
                    yield said.rpartition(" is served at ")[2].split()[0]
                    return
                if server.poll() is not None or time.monotonic() > until:
                    raise StageError(f"the server of {artifact} did not get ready: {said.strip()[-2000:]}")
                time.sleep(0.05)
        finally:
            server.terminate()
            server.wait()


def through_http(address: str, load: Load) -> dict[str, Any]:
    """{tokens_per_s, first_token_s, latency_s: {p50, p90, p99}} of completions that stream."""
    try:
        import httpx
    except ImportError as error:
        raise UnavailableError("httpx is not installed", hint="pip install 'enginewright[serve]'") from error
    model = httpx.get(f"{address}/v1/models").json()["data"][0]
    body = {
        "model": model["id"], "max_tokens": load.new, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    most = httpx.get(f"{address}/openapi.json").json()["components"]["schemas"]["TokenId"]["maximum"]

    async def one(client: Any, number: int) -> tuple[float, float, int]:
        prompt = [8 + (number * 7919 + place * 104729) % (most - 8) for place in range(load.prompt)]
        started, first, tokens = time.perf_counter(), 0.0, 0
        async with client.stream("POST", f"{address}/v1/completions", json={**body, "prompt": prompt}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter()
                    if '"usage"' in line:
                        tokens = int(line.partition('"completion_tokens": ')[2].partition(",")[0])
                    elif '"error"' in line:
                        raise StageError(f"the server answers {line[6:300]}")
            answer.raise_for_status()
        return first - started, time.perf_counter() - started, tokens

    async def all_of_them() -> tuple[list[tuple[float, float, int]], float]:
        limits = httpx.Limits(max_connections=load.streams)
        async with httpx.AsyncClient(timeout=None, limits=limits) as client:
            waiting = iter(range(load.requests))

            async def stream() -> list[tuple[float, float, int]]:
                return [await one(client, number) for number in waiting]

            await one(client, 0)
            started = time.perf_counter()
            found = await asyncio.gather(*(stream() for _ in range(load.streams)))
            return [each for some in found for each in some], time.perf_counter() - started

    found, wall_s = asyncio.run(all_of_them())
    latencies = sorted(each[1] for each in found)
    return {
        "streams": load.streams, "requests": load.requests, "prompt": load.prompt, "new": load.new,
        "tokens_per_s": sum(each[2] for each in found) / wall_s,
        "first_token_s": median(each[0] for each in found),
        "latency_s": {f"p{p}": latencies[min(len(latencies) - 1, len(latencies) * p // 100)] for p in (50, 90, 99)},
    }  # fmt: skip
