"""The code that builds, against TensorRT 10.16 and 11.1 as their bindings are: no GPU is here to run the real ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pipeline.errors import UnavailableError
from pipeline.stages.tensorrt import api as trt_api
from pipeline.stages.tensorrt import engine as trt_engine
from pipeline.stages.tensorrt.build import Build
from pipeline.stages.tensorrt.engine import EngineOptions
from pipeline.step import silent
from tests.targets import trt_signatures
from tests.targets.trt_stand_in import VERSIONS, called, check_call, recorded, stand_in


def typed(folder: Path) -> Path:
    """A typed graph as stage tensorrt.graph leaves it: one product in fp16."""
    folder.mkdir()
    text = """
    <ir_version: 11, opset_import: ["" : 23]>
    toy (float16[batch, sequence, 4] x) => (float16[batch, sequence, 2] y) { y = MatMul (x, w) }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 2), np.float16), "w"))
    onnx.save(model, folder / "model.onnx")
    ports = {"inputs": [{"name": "x"}], "outputs": [{"name": "y"}]}
    engine = {"kind": "encoder", "precision": "fp16", "interface": ports, "components": {"model": "model.onnx"}}
    (folder / "engine.json").write_text(json.dumps(engine))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def options(**more: Any) -> EngineOptions:
    fields: dict[str, Any] = {
        "flavour": "tensorrt", "capabilities": ("9.0",), "together": True, "batch": (1, 2, 4), "sequence": (1, 8, 16),
        "build": Build(), **more,
    }  # fmt: skip
    return EngineOptions(**fields)


def build(tmp_path: Path, trt: Any, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Path:
    monkeypatch.setattr(trt_api, "load", lambda name: trt)
    source, out = tmp_path / "graph", tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    if not source.exists():
        typed(source)
    out.mkdir()
    trt_engine.run({"graph": source}, options(**more), out, silent)
    return out


@pytest.mark.parametrize("version", VERSIONS)
def test_one_code_path_builds_with_10_and_11(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = stand_in(version, context=lambda _: {})
    out = build(tmp_path, trt, monkeypatch, sparse=True, timing_cache=str(tmp_path / "timing"))
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert trt.told["networks"] == [strongly_typed]
    config = trt.told["config"]
    assert [flag.name for (flag,) in called(config, "clear_flag")] == ["TF32"]
    assert [flag.name for (flag,) in called(config, "set_flag")] == ["SPARSE_WEIGHTS"]
    assert not called(config, "set_compute_capability")
    settings = json.loads((out / "engine.json").read_text())["settings"]
    assert settings["version"] == version
    assert settings["verified"] == "not verified on hardware"
    assert settings["profiles"] == [{"x": [[1, 1, 4], [2, 8, 4], [4, 16, 4]]}]
    assert json.loads((out / "inspector.sm90.json").read_text())["Layers"] == []
    assert "TensorRT-RTX" not in (out / "config.pbtxt").read_text()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_timing_cache_is_kept_for_a_device_and_a_version(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt, place = stand_in(version), tmp_path / "timing"
    build(tmp_path, trt, monkeypatch, timing_cache=str(place))
    assert called(trt.told["config"], "create_timing_cache") == [(b"",)]
    build(tmp_path, trt, monkeypatch, timing_cache=str(place))
    assert called(trt.told["config"], "create_timing_cache") == [(b"learned",)]
    build(tmp_path, trt, monkeypatch, timing_cache=str(place), capabilities=("8.0",))
    assert called(trt.told["config"], "create_timing_cache") == [(b"",)]
    assert sorted(path.name for path in place.iterdir()) == [
        f"tensorrt-{version}-opt3-sm{capability}.timing" for capability in ("80", "90")
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_only_this_flavour_can_do(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = stand_in(version)
    asked = Build(
        hardware_compatibility="ampere_plus", version_compatible=True, strip_weights=True, weight_streaming=True,
        workspace_mib=64, tf32=True,
    )  # fmt: skip
    build(tmp_path, trt, monkeypatch, build=asked)
    config = trt.told["config"]
    assert [flag.name for (flag,) in called(config, "set_flag")] == [
        "WEIGHT_STREAMING", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "STRIP_PLAN", "REFIT_IDENTICAL",
    ]  # fmt: skip
    assert not called(config, "clear_flag")
    assert config.values["hardware_compatibility_level"].name == "AMPERE_PLUS"
    assert called(config, "set_memory_pool_limit") == [(trt.MemoryPoolType.WORKSPACE, 64 << 20)]


@pytest.mark.parametrize("version", VERSIONS)
def test_without_a_gpu_it_says_so(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match="cannot start a builder") as caught:
        build(tmp_path, stand_in(version, gpu=False), monkeypatch)
    assert "driver" in caught.value.hint


@pytest.mark.parametrize("version", VERSIONS)
def test_the_stand_in_refuses_what_the_real_one_lacks(version: str) -> None:
    trt = stand_in(version)
    config = trt.Builder(None).create_builder_config()
    with pytest.raises(AttributeError, match="num_compute_capabilities"):
        config.num_compute_capabilities = 1
    with pytest.raises(TypeError):
        config.set_timing_cache(None)
    with pytest.raises(TypeError):
        check_call("f(self: t.T, a: int, b: str = None) -> None", (1,), {"c": 2})
    check_call("f(self: t.T, a: dict[int, str], b: str = None) -> None", ({},), {"b": ""})
    assert ("FP16" in dir(trt.BuilderFlag)) == version.startswith("10")


@pytest.mark.optin
@pytest.mark.skipif(
    not os.environ.get("ENGINEWRIGHT_TRT_BINDINGS"), reason="ENGINEWRIGHT_TRT_BINDINGS=1 downloads them"
)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_recorded_signatures_are_those_of_the_real_bindings(version: str) -> None:
    assert trt_signatures.of_version(version) == recorded(version)
