"""The server as strangers meet it: its own schema, sockets, limits, keys, crowds, and its end."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import websockets.sync.client as sockets

from pipeline.serve.server import listen
from tests.e2e.harness import BIN
from tests.serve.conftest import Serving, serving

NAME = "served"
LONG: dict[str, Any] = {"model": NAME, "prompt": "The list", "max_tokens": 900, "temperature": 0, "ignore_eos": True}


def ask(server: Serving, path: str = "/v1/completions", **more: Any) -> httpx.Response:
    body = {"model": NAME, "prompt": "The list", "max_tokens": 4, "temperature": 0, **more}
    return httpx.post(server.address + path, json=body, timeout=60)


def metric(server: Serving, name: str) -> float:
    page = httpx.get(f"{server.address}/metrics").text
    lines = [line for line in page.splitlines() if line.startswith(f"vllm:{name}{{")]
    return float(lines[0].rpartition(" ")[2])


def wait_until(true: Any, what: str, limit_s: float = 30) -> None:
    until = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def schemathesis(server: Serving, examples: int, place: Path) -> str:
    """What it prints; it must find nothing."""
    argv = ["run", f"{server.address}/openapi.json", "--checks", "all", "--max-examples", str(examples)]
    argv += ["--generation-deterministic", "--no-color", "--workers", "1", "--request-timeout", "120"]
    program = [sys.executable, str(BIN / "schemathesis")]
    done = subprocess.run([*program, *argv], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.parametrize("examples", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_schemathesis_finds_nothing(ort: Serving, examples: int, tmp_path: Path) -> None:
    assert "Selected: 9/9" in schemathesis(ort, examples, tmp_path)


@pytest.mark.slow
def test_schemathesis_finds_nothing_of_an_encoder(artifacts: Path, tmp_path: Path) -> None:
    with serving(artifacts / "sentences" / "cpu") as server:
        assert "Selected: 8/8" in schemathesis(server, 60, tmp_path)


def test_a_socket_streams_and_ends_with_its_client(ort: Serving) -> None:
    whole = ask(ort, max_tokens=20).json()
    url = ort.address.replace("http", "ws") + "/v1/stream"
    with sockets.connect(url) as socket:
        for _ in range(2):  # one request after the other on one socket
            socket.send(json.dumps({"model": NAME, "prompt": "The list", "max_tokens": 20, "temperature": 0}))
            text = ""
            while True:
                chunk = json.loads(socket.recv())
                if "usage" in chunk:
                    break
                text += chunk["choices"][0]["text"]
            assert text == whole["choices"][0]["text"]
            assert chunk["usage"] == whole["usage"]
        socket.send(json.dumps({"model": NAME, "messages": [{"role": "user", "content": "open()"}], "max_tokens": 4}))
        assert json.loads(socket.recv())["object"] == "chat.completion.chunk"
        while "usage" not in json.loads(socket.recv()):
            pass
        socket.send("{")
        assert "not JSON" in json.loads(socket.recv())["error"]["message"]
        socket.send(json.dumps({**LONG, "n": 16, "temperature": 1}))
        socket.recv()
    wait_until(lambda: metric(ort, "num_requests_running") == 0, "the batch goes on without its client")


def test_who_leaves_takes_his_work_along(ort: Serving) -> None:
    before = metric(ort, "request_aborted_total")
    for streams in (True, False):
        with pytest.raises(httpx.ReadTimeout), httpx.Client() as client:
            body = {**LONG, "n": 16, "temperature": 1, "stream": streams, "prompt": ["The list"] * 8}
            with client.stream("POST", f"{ort.address}/v1/completions", json=body, timeout=0.3) as answer:
                for _ in answer.iter_lines():
                    time.sleep(0.5)
                    raise httpx.ReadTimeout("has seen enough")
    wait_until(lambda: metric(ort, "num_requests_running") + metric(ort, "num_requests_waiting") == 0, "work goes on")
    assert metric(ort, "request_aborted_total") >= before + 2
    assert ask(ort).status_code == 200


def test_limits_and_keys(artifacts: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    options = ("--max-body", "20000", "--queue", "2", "--batch", "1", "--api-key-file", str(keys))
    with serving(artifacts / "served" / "onnxruntime", *options) as server:
        url, good = f"{server.address}/v1/completions", {"Authorization": "Bearer second"}
        assert httpx.get(f"{server.address}/health").status_code == 200
        assert httpx.get(f"{server.address}/metrics").status_code == 401
        assert httpx.post(url, json=LONG).status_code == 401
        assert httpx.post(url, json=LONG, headers={"Authorization": "Bearer third"}).status_code == 401
        large = httpx.post(url, json={**LONG, "prompt": "x" * 30000}, headers=good)
        assert (large.status_code, large.json()["error"]["type"]) == (413, "invalid_request_error")
        for body in (b"{", b"[]", b'{"a": NaN}', b"\xff", b'{"prompt": "\\ud800"}', b"[" * 15000):
            assert httpx.post(url, content=body, headers=good).status_code == 400, body[:20]
        assert httpx.post(url, json={**LONG, "n": 2, "temperature": 1}, headers=good).status_code == 400

        answers: list[httpx.Response] = []
        crowd = [
            threading.Thread(target=lambda: answers.append(httpx.post(url, json=LONG, headers=good, timeout=60)))
            for _ in range(12)
        ]
        for each in crowd:
            each.start()
        for each in crowd:
            each.join()
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 429}, codes
        assert {answer.headers["retry-after"] for answer in answers if answer.status_code == 429} == {"1"}
        texts = {answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200}
        assert len(texts) == 1


async def _crowd(server: Serving, streams: int, wanted: dict[str, str]) -> tuple[int, int]:
    """(answers that were right, clients that left) of so many streams at once; some are slow, some vanish."""
    client = openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=120)
    prompts = list(wanted)

    async def one(number: int) -> bool | None:
        prompt = prompts[number % len(prompts)]
        stream = await client.completions.create(
            model=NAME, prompt=prompt, max_tokens=60, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].text
            if number % 8 == 3:
                await stream.close()
                return None
            if number % 8 == 5:
                await asyncio.sleep(0.02)
        assert text == wanted[prompt]
        return True

    found = await asyncio.gather(*(one(number) for number in range(streams)))
    await client.close()
    return sum(each is True for each in found), sum(each is None for each in found)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_crowd_gets_its_own_answers(runtime: str, artifacts: Path) -> None:
    """64 streams at once, in a batch of 16: each gets what it gets alone."""
    with serving(artifacts / "served" / runtime) as server:
        prompts = [
            "The list",
            "Return a new",
            "If the argument is",
            "Errors",
            "module os\n\nThis",
            "class Foo",
            "A",
            "def f",
        ]
        wanted = {
            prompt: ask(server, prompt=prompt, max_tokens=60, ignore_eos=True).json()["choices"][0]["text"]
            for prompt in prompts
        }
        assert asyncio.run(_crowd(server, 64, wanted)) == (56, 8)
        wait_until(lambda: metric(server, "num_requests_running") == 0, "work goes on")
        assert server.end() == 0


@pytest.mark.slow
def test_memory_stays_flat_over_two_thousand_requests(artifacts: Path) -> None:
    with serving(artifacts / "served" / "onnxruntime") as server:
        wanted = {p: ask(server, prompt=p, max_tokens=60, ignore_eos=True).json()["choices"][0]["text"] for p in "abcd"}
        asyncio.run(_crowd(server, 250, wanted))
        early = server.rss_mb()
        for _ in range(7):
            asyncio.run(_crowd(server, 250, wanted))
        assert server.rss_mb() < early * 1.05 + 8
        assert server.end() == 0


@pytest.mark.parametrize("streams", [True, False])
def test_sigterm_lets_what_is_under_way_end(streams: bool, artifacts: Path) -> None:
    with serving(artifacts / "served" / "onnxruntime") as server:
        alone = httpx.post(f"{server.address}/v1/completions", json=LONG, timeout=60).json()["choices"][0]["text"]
        texts: list[str] = []

        def read() -> None:
            url = f"{server.address}/v1/completions"
            if not streams:
                texts.append(httpx.post(url, json=LONG, timeout=60).json()["choices"][0]["text"])
                return
            with httpx.stream("POST", url, json={**LONG, "stream": True}, timeout=60) as answer:
                lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
            assert lines.pop() == "[DONE]"
            texts.append("".join(json.loads(line)["choices"][0]["text"] for line in lines))

        readers = [threading.Thread(target=read) for _ in range(8)]
        for each in readers:
            each.start()
        wait_until(lambda: metric(server, "num_requests_running") == 8, "not all of them run", 5)
        assert server.end(signal.SIGTERM) == 0
        for each in readers:
            each.join()
        assert texts == [alone] * 8
        assert "Traceback" not in "".join(server.said)


def test_an_address_that_is_taken(ort: Serving, artifacts: Path) -> None:
    port = ort.address.rpartition(":")[2]
    argv = [
        sys.executable,
        str(BIN / "enginewright"),
        "serve",
        str(artifacts / "served" / "onnxruntime"),
        "--port",
        port,
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert f"127.0.0.1:{port} cannot be taken" in done.stderr


def test_an_answer_that_takes_too_long(artifacts: Path) -> None:
    with serving(artifacts / "served" / "onnxruntime", "--timeout", "0.05") as server:
        body = {**LONG, "n": 16, "temperature": 1}
        assert httpx.post(f"{server.address}/v1/completions", json=body, timeout=60).status_code == 504
        with httpx.stream("POST", f"{server.address}/v1/completions", json={**body, "stream": True}) as answer:
            assert '"timeout_error"' in answer.read().decode()
        wait_until(lambda: metric(server, "num_requests_running") == 0, "the work goes on")


def test_ten_megabytes_of_prompt(ort: Serving, artifacts: Path) -> None:
    assert ask(ort, prompt="list " * (2 << 20)).status_code == 413
    with serving(artifacts / "served" / "onnxruntime", "--max-body", str(16 << 20)) as server:
        before = server.rss_mb()
        for _ in range(3):
            answer = ask(server, prompt="list " * (2 << 20))
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, None)
            assert "context ends at 1024" in answer.json()["error"]["message"]
        assert ask(server).status_code == 200
        assert server.rss_mb() < before + 1500


def test_times_of_tokens_are_those_of_the_engine(ort: Serving) -> None:
    """Also of an answer that goes out whole: its tokens do not all come at its end."""
    names = ("time_to_first_token_seconds_sum", "time_per_output_token_seconds_sum", "e2e_request_latency_seconds_sum")
    before = [metric(ort, name) for name in names]
    assert ask(ort, max_tokens=300, ignore_eos=True).status_code == 200
    first, between, whole = (metric(ort, name) - was for name, was in zip(names, before, strict=True))
    assert first + between == pytest.approx(whole)
    assert between > first


def test_the_end_of_an_answer_does_not_wait_for_its_beginning() -> None:
    """Nagle's algorithm would hold it back for 40 ms."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def meet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen("127.0.0.1", 0)
        async with await asyncio.start_server(meet, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            option = await found
            writer.close()
        return option

    assert asyncio.run(accepted())
