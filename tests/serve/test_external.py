"""Artifacts that other projects' servers serve: what is started, printed and written for containers."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml

from tests.e2e.harness import BIN, DATA, MODEL, command, environment
from tests.registry.server import program

RECIPE = f"""\
name: elsewhere
model: {{source: {MODEL}, license: PSF-2.0}}
parity:
  data: {{path: {DATA}/pydoc-heldout.txt, samples: 2, length: 64}}
  prompts: {DATA}/prompts.jsonl
  prompt_count: 1
  new_tokens: 4
targets:
  vllm: {{runtime: vllm, serve: {{max_model_len: 512, tp: 2}}}}
  vllm-cpu:
    {{runtime: vllm, device: cpu, gates: {{top1: null}}, serve: {{max_model_len: 512, gpu_memory_utilization: 0.2}}}}
  turbomind: {{runtime: turbomind}}
  ollama: {{runtime: gguf, precision: Q8_0, layout: ollama}}
  gguf: {{runtime: gguf, precision: Q8_0}}
  openvino: {{runtime: openvino}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("elsewhere")
    (root / "recipe.yaml").write_text(RECIPE, "utf-8")
    done = command("build", root / "recipe.yaml", "--cache", root / "cache", "--out", root / "out", "-q")
    assert done.code == 0, done.err
    return root / "out" / "elsewhere"


def serve(artifact: Path, *more: str) -> str:
    done = command("enginewright", "serve", artifact, *more)
    assert done.code == 0, done.err
    return done.out


def test_the_command_is_the_manifests(made: Path) -> None:
    words = shlex.split(serve(made / "vllm", "--print", "--host", "0.0.0.0", "--port", "9"))
    manifest = json.loads((made / "vllm" / "manifest.json").read_text())
    told = [word.replace("{artifact}", str(made / "vllm")) for word in manifest["runtime"]["command"]]
    told += ["--served-model-name", "elsewhere"]
    assert [w for w in words if w not in ("0.0.0.0", "9")] == [w for w in told if w not in ("127.0.0.1", "8000")]
    assert shlex.split(serve(made / "vllm", "--print", "--name", "mine"))[-2:] == ["--served-model-name", "mine"]
    assert words[words.index("--host") + 1] == "0.0.0.0" and words[words.index("--port") + 1] == "9"
    assert "--backend turbomind" in serve(made / "turbomind", "--print")
    assert "OLLAMA_HOST=127.0.0.1:8000" in serve(made / "ollama", "--print")
    assert serve(made / "openvino", "--print").startswith("enginewright serve ")
    assert " --name mine --batch 4" in serve(made / "openvino", "--print", "--batch", "4", "--name", "mine")


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("vllm", (), ("vllm/vllm-openai:v", "--tensor-parallel-size", "/model")),
        ("turbomind", (), ("openmmlab/lmdeploy:v", "--server-name", "0.0.0.0")),
        ("ollama", (), ("ollama/ollama", "OLLAMA_MODELS")),
        ("gguf", ("--framework", "llama-server", "--image", "llama-server:1"), ("llama-server:1", ".gguf")),
        ("gguf", (), ("enginewright:", "serve")),
        ("openvino", ("--framework", "ovms"), ("openvino/model_server", "--rest_port", "elsewhere")),
        ("openvino", ("--batch", "4", "--name", "mine"), ("--batch", "mine")),
    ],
)
def test_compose_and_kubernetes(target: str, options: tuple[str, ...], words: tuple[str, ...], made: Path) -> None:
    text = serve(made / target, "--compose", *options)
    (service,) = yaml.safe_load(text)["services"].values()
    (port,) = service["ports"]
    assert port.startswith("127.0.0.1:")
    assert service["volumes"][0]["source"] == str(made / target) and service["volumes"][0]["read_only"]
    assert all(word in text for word in words), text
    subprocess.run([program("docker-compose"), "-f", "-", "config", "-q"], input=text, text=True, check=True)
    deployment, of_service = yaml.safe_load_all(serve(made / target, "--kubernetes", "--claim", "models", *options))
    for each in (deployment, of_service):
        kubernetes_validate.validate(each, "1.33", strict=True)
    pod = deployment["spec"]["template"]["spec"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "models"
    assert of_service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert of_service["spec"]["ports"][0]["targetPort"] == pod["containers"][0]["ports"][0]["name"]
    asked = pod["containers"][0]["resources"]["requests"]
    held = sum(file["size"] for file in json.loads((made / target / "manifest.json").read_text())["files"])
    assert int(asked["memory"].removesuffix("Mi")) << 20 > held
    limits = pod["containers"][0]["resources"].get("limits", {})
    assert limits == (
        {"nvidia.com/gpu": {"vllm": 2, "turbomind": 1}[target]} if target in ("vllm", "turbomind") else {}
    )


@pytest.mark.parametrize(
    ("target", "options", "code", "words"),
    [
        ("vllm", ("--framework", "ovms"), 64, "ovms does not serve this artifact"),
        ("gguf", ("--framework", "llama-server", "--compose"), 64, "name one with --image"),
        ("openvino", ("--framework", "ovms"), 5, "is started in a container"),
        ("turbomind", (), 5, "lmdeploy is not installed here"),
        ("vllm", ("--port", "0"), 64, "name a free port"),
        ("vllm", ("--batch", "4"), 64, "--batch: vllm's server does not take it"),
        ("vllm", ("--api-key-file", "{keys}", "--compose"), 64, "holds no secrets"),
        ("vllm", ("--api-key-file", "{keys}"), 64, "takes one key, not 2"),
        ("turbomind", ("--api-key-file", "{keys}"), 64, "asks for no keys"),
        ("ollama", ("--name", "mine"), 64, "--name: ollama"),
    ],
)
def test_what_cannot_be_served(target: str, options: tuple[str, ...], code: int, words: str, made: Path) -> None:
    if target == "turbomind" and shutil.which("lmdeploy"):
        pytest.skip("lmdeploy is here")
    (keys := made / "keys").write_text("one\ntwo\n")
    done = command("enginewright", "serve", made / target, *(option.format(keys=keys) for option in options))
    assert (done.code, words in done.err) == (code, True), done.err


STAND_IN = """#!{python}
import json, os, signal, socket, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if "dies" in sys.argv[0]:
    sys.exit(7)
if "loads" in sys.argv[0]:
    print("loading", file=sys.stderr, flush=True)
    while True: signal.pause()
class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def answer(self, body):
        key = os.environ.get("VLLM_API_KEY")
        self.send_response(401 if key and self.headers["Authorization"] != "Bearer " + key else 200)
        self.end_headers(); self.wfile.write(json.dumps(body).encode())
    def do_GET(self): self.answer({{"data": [{{"id": "m"}}]}})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({{"choices": [{{"text": "x", "finish_reason": "length"}}]}})
class Server(HTTPServer):
    address_family = socket.AF_INET6 if ":" in sys.argv[sys.argv.index("--host") + 1] else socket.AF_INET
Server((sys.argv[sys.argv.index("--host") + 1], int(sys.argv[sys.argv.index("--port") + 1])), Answer).serve_forever()
"""


def start(artifact: Path, place: Path, port: int, *more: str, **env: str) -> subprocess.Popen[str]:
    argv = [sys.executable, str(BIN / "enginewright"), "serve", str(artifact), "--port", str(port), *more]
    path = f"{place}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env={**environment(), "PATH": path, **env})


def stand_in(place: Path) -> Path:
    """A folder with a program in vLLM's place; its name says how the program behaves."""
    place.mkdir()
    program = place / "vllm"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    return place


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("dies", [False, True])
def test_another_server_is_started_and_ended(dies: bool, made: Path, tmp_path: Path) -> None:
    """A program in vLLM's place: what is waited for, told and passed on. The opt-in below asks vLLM itself."""
    server = start(made / "vllm", stand_in(tmp_path / ("dies" if dies else "bin")), free_port())
    assert server.stderr
    line = server.stderr.readline()
    if dies:
        assert "ended with exit code 7 before its first token" in line
        assert server.wait(30) == 3
        return
    assert " is served at http://127.0.0.1:" in line
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0


def test_another_server_asks_for_the_key(made: Path, tmp_path: Path) -> None:
    port = free_port()
    server = start(made / "vllm", stand_in(tmp_path / "bin"), port, ENGINEWRIGHT_API_KEY="secret")
    assert server.stderr
    assert " is served at http://127.0.0.1:" in server.stderr.readline()  # the probe has the key
    models = f"http://127.0.0.1:{port}/v1/models"
    assert httpx.get(models).status_code == 401
    assert httpx.get(models, headers={"Authorization": "Bearer secret"}).status_code == 200
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0


def test_it_may_be_ended_while_it_loads(made: Path, tmp_path: Path) -> None:
    server = start(made / "vllm", stand_in(tmp_path / "loads"), free_port())
    assert server.stderr
    assert server.stderr.readline() == "loading\n"
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0
    assert not server.stderr.read()


def test_a_server_that_gives_no_token_is_ended(made: Path, tmp_path: Path) -> None:
    server = start(made / "vllm", stand_in(tmp_path / "loads"), free_port(), ENGINEWRIGHT_FIRST_TOKEN_S="2")
    assert server.stderr
    said = server.stderr.read()
    assert server.wait(60) == 3
    assert "gave no token within 2 s, and was ended" in said
    assert "ENGINEWRIGHT_FIRST_TOKEN_S" in said


def test_an_address_of_ip_version_6(made: Path, tmp_path: Path) -> None:
    server = start(made / "vllm", stand_in(tmp_path / "bin"), free_port(), "--host", "::1")
    assert server.stderr
    assert " is served at http://[::1]:" in server.stderr.readline()
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0


@pytest.mark.optin
@pytest.mark.skipif(
    not os.environ.get("ENGINEWRIGHT_TOOLCHAIN_VLLM_CPU"), reason="another environment: ENGINEWRIGHT_TOOLCHAIN_VLLM_CPU"
)
def test_vllm_itself_answers(made: Path) -> None:
    port = free_port()
    server = start(made / "vllm-cpu", Path(os.devnull), port)
    try:
        assert server.stderr
        until = time.monotonic() + 600
        while " is served at " not in (line := server.stderr.readline()):
            assert line and time.monotonic() < until
        body: dict[str, Any] = {"prompt": "The list", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        model = httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"][0]["id"]
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={**body, "model": model}, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 4
        assert model == "elsewhere"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def test_a_reference_is_pulled_first(made: Path, tmp_path: Path) -> None:
    layout = f"oci:{tmp_path / 'layout'}:1"
    done = command("enginewright", "push", made / "gguf", layout)
    assert done.code == 0, done.err
    done = command("enginewright", "serve", layout, "--target", "gguf", "--out", tmp_path / "out", "--print")
    assert done.code == 0, done.err
    assert shlex.split(done.out)[:3] == ["enginewright", "serve", str(tmp_path / "out" / "elsewhere" / "gguf")]
    assert command("enginewright", "verify", tmp_path / "out" / "elsewhere" / "gguf").code == 0
    assert command("enginewright", "serve", layout, "--target", "other", "--print", "--out", tmp_path / "no").code != 0
