"""Opening and running plans, with NVIDIA's bindings as they are recorded and ONNX Runtime in the place of the GPU.

The stand-in's execution context reads and writes raw memory at the addresses that it was given, so that what is tested
are the addresses, shapes, profiles and shared buffers that the runner hands to the library.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from pipeline.engine import Sampling, completions
from pipeline.errors import EnginewrightError, StageError, UnavailableError, VerificationError
from pipeline.hardware import Device, Hardware
from pipeline.stages.onnx import torch as onnx_torch
from pipeline.stages.onnx.torch import TorchExportOptions
from pipeline.stages.tensorrt import api as trt_api
from pipeline.stages.tensorrt import decoder as trt_decoder
from pipeline.stages.tensorrt import engine as trt_engine
from pipeline.stages.tensorrt import graph as trt_graph
from pipeline.stages.tensorrt.build import Build
from pipeline.stages.tensorrt.decoder import StaticOptions
from pipeline.stages.tensorrt.engine import EngineOptions
from pipeline.stages.tensorrt.graph import GraphOptions
from pipeline.step import silent
from pipeline.targets import tensorrt, trt_judge, trt_plan, trt_runner
from tests import models
from tests.stages.decoders import write_decoder
from tests.targets.trt_stand_in import VERSIONS, called, stand_in

_NUMPY = {"float16": np.float16, "float": np.float32, "int64": np.int64}
_NAMES = {"float16": "HALF", "float": "FLOAT", "int64": "INT64"}


class Session:
    """A plan's graph, run by ONNX Runtime on raw memory."""

    def __init__(self, graph: Path, profiles: list[dict[str, Any]]) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.inputs = {arg.name: arg for arg in self.session.get_inputs()}
        self.outputs = {arg.name: arg for arg in self.session.get_outputs()}
        self.profiles, self.profile = profiles, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.used: list[tuple[int, tuple[int, ...]]] = []

    def kind(self, name: str) -> str:
        return str((self.inputs.get(name) or self.outputs[name]).type[7:-1])

    def view(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        kind = np.dtype(_NUMPY[self.kind(name)])
        size = int(np.prod(shape)) * kind.itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, kind).reshape(shape)

    def set_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.profiles[self.profile][name]
        self.shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def shape_of(self, name: str) -> tuple[int, ...]:
        sizes = {}
        for each, shape in self.shapes.items():
            sizes |= {d: s for d, s in zip(self.inputs[each].shape, shape, strict=True) if isinstance(d, str)}
        return tuple(sizes.get(dim, dim) for dim in self.outputs[name].shape)

    def execute(self, stream: int) -> bool:
        feeds = {name: self.view(name, shape).copy() for name, shape in self.shapes.items()}
        self.used.append((self.profile, self.shapes["input_ids"]))
        names = list(self.outputs)
        for name, value in zip(names, self.session.run(names, feeds), strict=True):
            self.view(name, value.shape)[...] = value
        return True

    def members(self, trt: Any) -> dict[str, Any]:
        """What the stand-in's engine does."""
        names = [*self.inputs, *self.outputs]
        alias = lambda name: name.replace("present.", "past_key_values.") if name.startswith("present.") else None  # noqa: E731

        def use(index: int, stream: int) -> bool:
            self.profile = index
            return True

        def context(*_: Any) -> Any:
            return trt.classes["IExecutionContext"](
                set_input_shape=self.set_shape,
                set_tensor_address=lambda name, address: self.addresses.update({name: address}),
                infer_shapes=lambda: [name for name in self.inputs if name not in self.shapes],
                get_tensor_shape=self.shape_of,
                execute_async_v3=self.execute,
                set_optimization_profile_async=use,
            )

        return {
            "num_io_tensors": len(names),
            "get_tensor_name": lambda index: names[index],
            "get_tensor_mode": lambda name: trt.TensorIOMode.INPUT if name in self.inputs else trt.TensorIOMode.OUTPUT,
            "get_tensor_dtype": lambda name: trt.DataType[_NAMES[self.kind(name)]],
            "get_aliased_input_tensor": alias,
            "create_execution_context": context,
        }


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Typed graphs of a decoder and of an encoder, fp16."""
    found = {}
    for kind, write in (("decoder", lambda p: write_decoder(p, "Llama")), ("encoder", models.bert)):
        root = tmp_path_factory.mktemp(kind)
        model, export, out = write(root / "model"), root / "export", root / "graph"
        for place in (export, out):
            place.mkdir()
        if kind == "decoder":
            trt_decoder.run({"model": model}, StaticOptions(cache_length=40), export, silent)
        else:
            onnx_torch.run({"model": model}, TorchExportOptions(), export, silent)
        trt_graph.run({"model": model, "export": export}, GraphOptions(precision="fp16"), out, silent)
        found[kind] = out
    return found


def engine(graph: Path, out: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any, list[Session]]:
    """(engine's folder, the module, what ran it) of a build by the stand-in."""
    sessions: list[Session] = []

    def context(trt: Any) -> dict[str, Any]:
        profiles = json.loads((out / "engine.json").read_text())["settings"]["profiles"]
        sessions.append(Session(graph / "model.onnx", profiles))
        return sessions[-1].members(trt)

    trt = stand_in(version)
    monkeypatch.setattr(trt_api, "load", lambda name: trt)
    out.mkdir()
    options = EngineOptions(
        flavour="tensorrt", capabilities=("9.0",), together=True, batch=(1, 2, 4), sequence=(1, 8, 16), build=Build()
    )
    trt_engine.run({"graph": graph}, options, out, silent)
    running = stand_in(version, context=context)
    monkeypatch.setattr(trt_api, "load", lambda name: running)
    return out, running, sessions


@pytest.mark.parametrize("version", VERSIONS)
def test_a_decoder_runs_in_its_own_memory(
    version: str, graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, trt, sessions = engine(graphs["decoder"], tmp_path / "out", version, monkeypatch)
    module, plan, about = trt_plan.open_plan(folder, "9.0")
    assert trt.told["runtime"].values["engine_host_code_allowed"] is False
    opened = trt_runner.engine_over(module, plan, about, "cpu")
    judge = trt_judge.open_engine(graphs["decoder"])
    ids = np.random.default_rng(0).integers(5, 300, (3, 25))
    mask = np.ones_like(ids)
    mask[1, :9] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    found, wanted = opened.run(given)["logits"], judge.run(given)["logits"]
    np.testing.assert_allclose(found[mask == 1], wanted[mask == 1], atol=5e-3)
    prompts = [[5, 6, 7], list(range(20, 40)), [9], [8, 8], [11]]  # more than the largest batch
    sampling = Sampling(max_new_tokens=8, eos_token_ids=())
    assert completions(opened, prompts, sampling) == completions(judge, prompts, sampling)
    used = sessions[0].used
    assert {profile for profile, shape in used if shape[1] == 1} == {1}
    assert {profile for profile, shape in used if shape[1] > 1} == {0}
    assert max(shape[1] for _, shape in used) == 16
    assert max(shape[0] for _, shape in used) == 4


@pytest.mark.parametrize("version", VERSIONS)
def test_an_encoder_answers_in_one_pass(
    version: str, graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = engine(graphs["encoder"], tmp_path / "out", version, monkeypatch)
    opened = trt_runner.engine_over(*trt_plan.open_plan(folder, "9.0"), "cpu")
    ids = np.arange(5, 25).reshape(2, 10)
    found = opened.run({"input_ids": ids})["last_hidden_state"]
    wanted = trt_judge.open_engine(graphs["encoder"]).run({"input_ids": ids})["last_hidden_state"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    with pytest.raises(StageError, match=r"shape \[2, 17\], outside"):
        opened.run({"input_ids": np.full((2, 17), 5)})
    about = json.loads((folder / "engine.json").read_text())
    about["interface"]["outputs"].append({"name": "pooled"})
    (folder / "engine.json").write_text(json.dumps(about))
    with pytest.raises(StageError, match="no tensor 'pooled'"):
        trt_runner.engine_over(*trt_plan.open_plan(folder, "9.0"), "cpu")


# what is refused before a byte is loaded


def refuse(graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    folder, trt, _ = engine(graphs["encoder"], tmp_path / "out", VERSIONS[0], monkeypatch)
    return folder, trt


@pytest.mark.parametrize(
    ("wrong", "capability", "error", "words"),
    [
        ("byte", "9.0", VerificationError, "is not the plan that was built"),
        ("gone", "9.0", VerificationError, "is missing"),
        ("", "8.9", UnavailableError, "compiled for compute capability 9.0, and this GPU has 8.9"),
        ("version", "9.0", UnavailableError, "was built by TensorRT 10.0.0"),
        ("engine.json", "9.0", StageError, "is not of an engine for TensorRT"),
        ("refused", "9.0", StageError, "does not load"),
    ],
)
def test_what_is_wrong_is_said_and_not_loaded(
    wrong: str, capability: str, error: type[EnginewrightError], words: str,
    graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, trt = refuse(graphs, tmp_path, monkeypatch)
    plan, about = folder / "1" / "model.plan", folder / "engine.json"
    if wrong == "byte":
        data = bytearray(plan.read_bytes())
        data[len(data) // 2] ^= 1
        plan.write_bytes(data)
    elif wrong == "gone":
        plan.unlink()
    elif wrong == "version":
        about.write_text(about.read_text().replace(VERSIONS[0], "10.0.0"))
    elif wrong == "engine.json":
        about.write_text('{"settings": {}}')
    elif wrong == "refused":
        trt = stand_in(VERSIONS[0])
        monkeypatch.setattr(trt_api, "load", lambda name: trt)
    with pytest.raises(error, match=words):
        trt_plan.open_plan(folder, capability)
    loaded = called(trt.told["runtime"], "deserialize_cuda_engine") if "runtime" in trt.told else []
    assert bool(loaded) == (wrong == "refused")


def test_without_a_driver_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(UnavailableError, match="no NVIDIA driver") as caught:
        trt_plan.device_capability()
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("device", "ok", "words"),
    [
        (None, False, "8.6 or 8.9, and this machine has none"),
        (Device("cuda", "NVIDIA L4", "8.9", 1, "590.1"), True, "NVIDIA L4"),
        (Device("cuda", "NVIDIA L4", "8.9", 1, "570.124.06"), False, "driver 580 or newer, and this machine has 570"),
        (Device("cuda", "NVIDIA H200", "9.0", 1, "590.1"), False, "this machine has NVIDIA H200 \\(9.0\\)"),
    ],
)
def test_can_run(device: Device | None, ok: bool, words: str) -> None:
    manifest = {"target": {"device": {"kind": "cuda", "compute_capability": ["8.6", "8.9"], "min_driver": "580"}}}
    host = Hardware("host", "linux", "x86_64", devices=(device,) if device else ())
    verdict = tensorrt.can_run(manifest, host)
    assert verdict.ok == ok
    assert re.search(words, verdict.reason), verdict.reason


def test_digests_are_of_the_plans(graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = refuse(graphs, tmp_path, monkeypatch)
    digests = json.loads((folder / "engine.json").read_text())["settings"]["digests"]
    data = (folder / "1" / "model.plan").read_bytes()
    assert digests == {"1/model.plan": f"sha256:{hashlib.sha256(data).hexdigest()}"}
