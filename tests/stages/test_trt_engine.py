"""Real TensorRT-RTX, on a machine without a GPU: preflight, plans for three generations, layout, progress."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pipeline.errors import StageError, UnavailableError
from pipeline.stages.tensorrt import api as trt_api
from pipeline.stages.tensorrt import decoder as trt_decoder
from pipeline.stages.tensorrt import engine as trt_engine
from pipeline.stages.tensorrt import graph as trt_graph
from pipeline.stages.tensorrt import preflight as trt_preflight
from pipeline.stages.tensorrt import triton as trt_triton
from pipeline.stages.tensorrt.build import Build
from pipeline.stages.tensorrt.decoder import StaticOptions
from pipeline.stages.tensorrt.engine import EngineOptions
from pipeline.stages.tensorrt.flavours import flavour
from pipeline.stages.tensorrt.graph import GraphOptions
from pipeline.stages.tensorrt.preflight import PreflightOptions
from pipeline.step import silent
from tests.stages.decoders import write_decoder

BITS = {"8.6": 4, "8.9": 8, "12.0": 16}
"""What a plan's header says at byte 32. NVIDIA does not document it: known from plans for one capability each."""


def mask_of(plan: Path) -> int:
    data = plan.read_bytes()
    assert b"vtrt" in data[:16]
    return data[32]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A decoder in fp16: checkpoint, export, typed graph."""
    root = tmp_path_factory.mktemp("decoder")
    write_decoder(root / "model", "Llama", dtype="bfloat16")
    for name in ("export", "graph"):
        (root / name).mkdir()
    trt_decoder.run({"model": root / "model"}, StaticOptions(cache_length=32), root / "export", silent)
    places = {name: root / name for name in ("model", "export", "graph")}
    trt_graph.run(places, GraphOptions(precision="fp16"), root / "graph", silent)
    return places


def build(decoder: dict[str, Path], out: Path, progress: Any = silent, **over: Any) -> Path:
    out.mkdir()
    fields: dict[str, Any] = {
        "flavour": "tensorrt-rtx", "capabilities": tuple(BITS), "together": True, "batch": (1, 2, 4),
        "sequence": (1, 8, 16), "build": Build(), **over,
    }  # fmt: skip
    trt_engine.run({"graph": decoder["graph"]}, EngineOptions(**fields), out, progress)
    return out


def test_one_plan_for_three_generations(decoder: dict[str, Path], tmp_path: Path) -> None:
    said: list[tuple[float, float, str]] = []
    out = build(decoder, tmp_path / "out", lambda done, total=0, note="": said.append((done, total, note)))
    plan = out / "1" / "model.plan"
    assert mask_of(plan) == sum(BITS.values())
    about = json.loads((out / "engine.json").read_text())
    settings = about["settings"]
    assert settings["flavour"] == about["runtime"] == "tensorrt-rtx"
    assert settings["compute_capabilities"] == list(BITS)
    assert settings["digests"] == {"1/model.plan": f"sha256:{hashlib.sha256(plan.read_bytes()).hexdigest()}"}
    assert settings["driver"] and settings["version"].startswith("1.")
    prompt, token = settings["profiles"]
    assert prompt["input_ids"] == [[1, 1], [2, 8], [4, 16]]
    assert token["input_ids"] == [[1, 1], [2, 1], [4, 1]]
    assert prompt["past_key_values.0.key"] == [[1, 2, 32, 16], [2, 2, 32, 16], [4, 2, 32, 16]]
    network = json.loads((out / "network.json").read_text())
    assert {"KV_CACHE_UPDATE", "ATTENTION_INPUT", "MATRIX_MULTIPLY"} <= {layer["type"] for layer in network["layers"]}
    assert max(done for done, _, _ in said) == 1
    assert "SM86, SM89, SM120" in said[-1][2]
    text = (out / "config.pbtxt").read_text()
    assert trt_triton.read(text)["cc_model_filenames"] == dict.fromkeys(BITS, "model.plan")
    assert 'name: "write_indices" data_type: TYPE_INT64 dims: [ 1 ] reshape: { shape: [ ] }' in text


def test_plans_apart(decoder: dict[str, Path], tmp_path: Path) -> None:
    out = build(decoder, tmp_path / "out", together=False, capabilities=("8.6", "12.0"))
    plans = {"8.6": "model.sm86.plan", "12.0": "model.sm120.plan"}
    assert trt_triton.read((out / "config.pbtxt").read_text())["cc_model_filenames"] == plans
    assert {name: mask_of(out / "1" / name) for name in plans.values()} == {plans[each]: BITS[each] for each in plans}


def test_progress_can_cancel(decoder: dict[str, Path], tmp_path: Path) -> None:
    def stop(done: float, total: float = 0, note: str = "") -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(decoder, tmp_path / "out", stop)
    assert not list((tmp_path / "out" / "1").iterdir())


def test_a_shape_outside_of_reason_is_the_librarys_word(decoder: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StageError, match="TensorRT-RTX"):
        build(decoder, tmp_path / "out", sequence=(8, 4, 2))


# preflight


def exported(folder: Path, text: str, **weights: np.ndarray) -> Path:
    folder.mkdir()
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k.replace("__", ".")) for k, v in weights.items())
    for node in model.graph.node:
        node.input[:] = [name.replace("__", ".") for name in node.input]
        node.name = f"node_{node.op_type}"
    onnx.save(model, folder / "model.onnx")
    (folder / "export.json").write_text(json.dumps({"components": {"model": "model.onnx"}}))
    return folder


def preflight(export: Path, model: Path, out: Path) -> dict[str, Any]:
    out.mkdir()
    trt_preflight.run({"export": export, "model": model}, PreflightOptions(), out, silent)
    found: dict[str, Any] = json.loads((out / "preflight.json").read_text())
    return found


def test_a_decoder_with_its_weights_in_the_checkpoint_passes(decoder: dict[str, Path], tmp_path: Path) -> None:
    found = preflight(decoder["export"], decoder["model"], tmp_path / "out")
    assert found["operators"]["TensorScatter"] == 4
    assert found["version"] == trt_api.version(trt_api.load("tensorrt-rtx"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["preflight.json"]


def test_a_refused_node_is_told_with_its_module(tmp_path: Path) -> None:
    """The node with no weight of its own lies between two products of one layer, which is what is said of it."""
    export = exported(
        tmp_path / "export",
        """toy (float[B, 4] x) => (float[B, 4] y) {
          a = MatMul (x, encoder__layer__0__dense__weight)
          b = Bernoulli (a)
          c = Bernoulli (b)
          y = MatMul (c, encoder__layer__0__out__weight)
        }""",
        encoder__layer__0__dense__weight=np.eye(4, dtype=np.float32),
        encoder__layer__0__out__weight=np.eye(4, dtype=np.float32),
    )
    with pytest.raises(UnavailableError) as caught:
        preflight(export, tmp_path / "export", tmp_path / "out")
    assert "refuses 2 of 4 nodes" in caught.value.message
    assert "Bernoulli 'node_Bernoulli' in encoder.layer.0: TensorRT has no such operator" in caught.value.message
    assert "onnxruntime" in caught.value.hint


def test_graphs_of_onnx_runtime_are_named_as_such(tmp_path: Path) -> None:
    export = exported(
        tmp_path / "export",
        """toy (float[B, 4] x) => (float[B, 4] y) {
          q, s, z = DynamicQuantizeLinear (x)
          y = DequantizeLinear (q, s, z)
        }""",
    )
    with pytest.raises(UnavailableError, match="DynamicQuantizeLinear") as caught:
        preflight(export, tmp_path / "export", tmp_path / "out")
    assert "int8" in caught.value.hint


def test_modules_of_nodes() -> None:
    graph = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]>
        toy (float[B, 4] x) => (float[B, 4] y) {
          a = MatMul (x, w1)
          b = Relu (a)
          c = MatMul (b, w2)
          y = Neg (c)
        }""").graph
    for old, new in (("w1", "h.0.up.weight"), ("w2", "h.1.up.weight")):
        graph.initializer.append(onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), new))
        for node in graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
    found = trt_preflight.modules_of(graph, range(4))
    assert found == {0: "h.0.up", 1: "h.0.up .. h.1.up", 2: "h.1.up", 3: "h.1.up"}


# Triton


def test_a_config_that_does_not_fit_is_refused() -> None:
    network = {
        "inputs": [{"name": "x", "dtype": "INT64", "shape": [-1, -1]}],
        "outputs": [{"name": "y", "dtype": "FLOAT", "shape": [-1, 384]}],
    }
    profiles: list[Any] = [{"x": ((1, 1), (2, 8), (7, 16))}]
    plans = {"8.6": "model.plan"}
    text = trt_triton.config(flavour("tensorrt"), network, profiles, plans, "model.plan")
    assert "max_batch_size: 7\n" in text
    for wrong, said in (
        (text.replace("TYPE_INT64", "TYPE_INT32"), "input 'x'"),
        (text.replace("384", "383"), "output 'y'"),
        (text.replace('"y"', '"z"'), "output 'y'"),
        (text.replace('"8.6"', '"8.9"'), "8.9"),
    ):
        with pytest.raises(StageError, match=said):
            trt_triton.check(wrong, network, plans)
    network["outputs"][0]["dtype"] = "FP4"
    with pytest.raises(StageError, match="no type"):
        trt_triton.config(flavour("tensorrt"), network, profiles, plans, "model.plan")
