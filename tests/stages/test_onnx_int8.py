"""Stage onnxruntime.encoder: int8 graphs that load, stay near fp32, and take their ranges from the data given."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from pipeline import hardware
from pipeline.errors import RecipeError
from pipeline.stages.onnx import int8 as onnx_int8
from pipeline.stages.onnx import patterns as onnx_patterns
from pipeline.stages.onnx import torch as onnx_torch
from pipeline.stages.onnx.int8_observe import _best_cut
from pipeline.step import silent
from tests import models

SENTENCES = [f"the {colour} fox number {n} is served" for n in range(12) for colour in ("brown", "lazy", "quick")]


@pytest.fixture(scope="session")
def sentence_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, export/ and calibration/ of a tiny sentence-transformers folder."""
    root = tmp_path_factory.mktemp("sentences")
    models.sentence_transformer(root / "model")
    (root / "calibration").mkdir()
    (root / "calibration" / "data.txt").write_text("\n".join(SENTENCES))
    return exported(root)


@pytest.fixture(scope="session")
def speech_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("speech")
    models.whisper(root / "model")
    return exported(root)


def exported(root: Path) -> Path:
    (root / "export").mkdir()
    onnx_torch.STAGE.run({"model": root / "model"}, onnx_torch.TorchExportOptions(), root / "export", silent)
    return root


def build(root: Path, out: Path, calibrated: bool = False, **options: Any) -> dict[str, Any]:
    out.mkdir()
    inputs = {role: root / role for role in ("model", "export", *(["calibration"] if calibrated else []))}
    reduced = {"reduce_range": onnx_int8.saturates(hardware.probe())}  # as the target has it for this machine
    told = onnx_int8.Int8Options(samples=len(SENTENCES), **{**reduced, **options})
    onnx_int8.STAGE.run(inputs, told, out, silent)
    engine: dict[str, Any] = json.loads((out / "engine.json").read_text())
    for component in engine["components"].values():
        onnx.checker.check_model(out / component)
    return engine


def run(path: Path, outputs: list[str] | None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    found: list[np.ndarray] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(
        outputs, inputs
    )
    return found


def embeddings(path: Path) -> np.ndarray:
    ids = np.random.default_rng(0).integers(5, models.VOCAB, (6, 19))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return run(path / "model.onnx", ["sentence_embedding"], inputs)[0]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))).min())


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        ({}, {"DynamicQuantizeLinear", "MatMulInteger"}, {"MatMul"}),
        ({"per_channel": False, "reduce_range": True}, {"MatMulInteger"}, {"MatMul"}),
        ({"mode": "static"}, {"QuantizeLinear", "DequantizeLinear", "MatMul"}, {"DynamicQuantizeLinear"}),
        ({"mode": "static", "activations": "int8"}, {"QuantizeLinear"}, {"MatMulInteger"}),
        ({"mode": "static", "calibration": "percentile"}, {"QuantizeLinear"}, {"MatMulInteger"}),
        ({"mode": "static", "calibration": "entropy"}, {"QuantizeLinear"}, {"MatMulInteger"}),
    ],
)
def test_int8_stays_near_fp32(
    sentence_model: Path, tmp_path: Path, options: dict[str, Any], present: set[str], absent: set[str]
) -> None:
    engine = build(sentence_model, tmp_path / "engine", calibrated="mode" in options, **options)
    assert (engine["runtime"], engine["precision"]) == ("onnxruntime", "int8")
    assert engine["quantization"]["method"] == options.get("mode", "dynamic")
    assert engine["quantization"]["products"] == 12
    found = operators(tmp_path / "engine" / "model.onnx")
    assert present <= found
    assert not absent & found
    assert cosine(embeddings(tmp_path / "engine"), embeddings(sentence_model / "export")) > 0.99


def test_the_folder_is_complete_and_small(
    sentence_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_patterns, "_TABLE", 4096)
    engine = build(sentence_model, tmp_path / "engine")
    names = {path.name for path in (tmp_path / "engine").iterdir()}
    assert {"model.onnx", "engine.json", "config.json", "tokenizer.json", "modules.json"} <= names
    assert engine["pooling"] == "mean"
    assert engine["interface"] == json.loads((sentence_model / "export" / "export.json").read_text())["interface"]
    weights = onnx.load(tmp_path / "engine" / "model.onnx").graph.initializer
    large = [tensor for tensor in weights if np.prod(tensor.dims) >= 4096]
    assert len(large) == 12 + 2  # the products; the tables of words and of positions
    assert {tensor.data_type for tensor in large} == {onnx.TensorProto.INT8}
    assert cosine(embeddings(tmp_path / "engine"), embeddings(sentence_model / "export")) > 0.99


@pytest.mark.parametrize(("reduced", "top"), [(False, 127), (True, 63)])
def test_weights_are_rounded_to_the_nearest_of_their_channel(
    sentence_model: Path, tmp_path: Path, reduced: bool, top: int
) -> None:
    build(sentence_model, tmp_path / "engine", reduce_range=reduced)
    before = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(sentence_model / "export/model.onnx").graph.initializer
    }
    after = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "engine/model.onnx").graph.initializer}
    checked = 0
    for name, weight_KN in before.items():
        quantized = after.get(f"{name.removesuffix('.weight')}.int8")
        if quantized is not None:
            scale_N = np.abs(weight_KN).max(0) / top
            assert np.abs(quantized * scale_N - weight_KN).max() <= scale_N.max() / 2 * 1.001
            checked += 1
    assert checked == 12


def test_excluded_products_stay_fp32(sentence_model: Path, tmp_path: Path) -> None:
    graph = onnx.load(sentence_model / "export" / "model.onnx").graph
    weights = {tensor.name for tensor in graph.initializer}
    name = next(node.input[1] for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights)
    engine = build(sentence_model, tmp_path / "engine", exclude=(name,), embeddings=False)
    assert (engine["quantization"]["products"], engine["quantization"]["products_fp32"]) == (11, 1)
    with pytest.raises(RecipeError, match="nothing_like_it"):
        build(sentence_model, tmp_path / "other", exclude=("nothing_like_it",))


def test_static_ranges_come_from_the_calibration_data(sentence_model: Path, tmp_path: Path) -> None:
    """Other data, other scales; and every observed value lies within the first ones' range."""
    build(sentence_model, tmp_path / "one", calibrated=True, mode="static")
    other = tmp_path / "root"
    shutil.copytree(sentence_model, other)
    (other / "calibration" / "data.txt").write_text("!\n" * len(SENTENCES))
    build(other, tmp_path / "two", calibrated=True, mode="static")
    scales = []
    for name in ("one", "two"):
        initializers = onnx.load(tmp_path / name / "model.onnx").graph.initializer
        found = {t.name: float(onnx.numpy_helper.to_array(t)) for t in initializers if not t.dims and t.data_type == 1}
        scales.append({name: value for name, value in found.items() if name.endswith(".scale")})
    assert scales[0].keys() == scales[1].keys()
    assert all(scales[0][name] != scales[1][name] for name in list(scales[0])[1:])


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no calibration data"), (b"", "empty"), (b"\xff\xfe", "UTF-8"), (b"one\n", "samples")],
)
def test_calibration_that_cannot_be_used_is_refused(
    sentence_model: Path, tmp_path: Path, content: bytes | None, words: str
) -> None:
    root = tmp_path / "root"
    shutil.copytree(sentence_model, root)
    if content is not None:
        (root / "calibration" / "data.txt").write_bytes(content)
    with pytest.raises(RecipeError, match=words):
        build(root, tmp_path / "engine", calibrated=content is not None, mode="static")


def test_static_needs_text_and_an_encoder(speech_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="dynamic"):
        build(speech_model, tmp_path / "engine", mode="static")


def test_speech_in_int8(speech_model: Path, tmp_path: Path) -> None:
    """Both graphs: the encoder's states and the decoder's logits stay near fp32's."""
    engine = build(speech_model, tmp_path / "engine")
    assert set(engine["quantization"]["components"]) == {"encoder", "decoder"}
    features = np.random.default_rng(0).standard_normal((2, 16, 100), dtype=np.float32)
    facts = engine["decoder"]
    ids = np.random.default_rng(1).integers(5, models.VOCAB, (2, 5))
    past = np.zeros((2, facts["kv_heads"], 0, facts["head_dim"]), np.float32)
    results = []
    for folder in (speech_model / "export", tmp_path / "engine"):
        session = ort.InferenceSession(folder / "encoder.onnx", providers=["CPUExecutionProvider"])
        encoded = dict(
            zip([o.name for o in session.get_outputs()], session.run(None, {"input_features": features}), strict=True)
        )
        hidden = encoded.pop("encoder_hidden_states")
        names = [f"past_key_values.{i}.{part}" for i in range(facts["layers"]) for part in ("key", "value")]
        given = {"input_ids": ids, **encoded, **dict.fromkeys(names, past)}
        results.append((hidden, run(folder / "decoder.onnx", ["logits"], given)[0]))
    assert cosine(results[0][0], results[1][0]) > 0.99
    assert cosine(results[0][1], results[1][1]) > 0.98


def test_fp16_and_fp32_are_served_by_the_same_stage(sentence_model: Path, tmp_path: Path) -> None:
    for precision, least in (("fp32", 0.99999), ("fp16", 0.9999)):
        assert build(sentence_model, tmp_path / precision, precision=precision)["precision"] == precision
        assert cosine(embeddings(tmp_path / precision), embeddings(sentence_model / "export")) > least


def test_the_same_inputs_give_the_same_bytes(sentence_model: Path, tmp_path: Path) -> None:
    for options in ({}, {"mode": "static", "calibration": "percentile"}):
        digests = set()
        for name in ("one", "two"):
            out = tmp_path / f"{name}{len(options)}"
            build(sentence_model, out, calibrated=True, **options)
            digests.add(tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())))
        assert len(digests) == 1


def test_the_entropy_search_cuts_a_lone_outlier() -> None:
    values = np.abs(np.random.default_rng(0).standard_normal(200_000))
    counts = np.histogram(np.append(values, 100.0), bins=2048, range=(0, 100.0))[0]
    cut = _best_cut(counts) * 100 / 2048
    assert 3 < cut < 20


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_weights_in_a_data_file(sentence_model: Path, tmp_path: Path, mode: str) -> None:
    """Large exports have their weights beside the graph: the same engine comes out."""
    root = tmp_path / "root"
    shutil.copytree(sentence_model, root)
    model = onnx.load(root / "export" / "model.onnx")
    (root / "export" / "model.onnx").unlink()
    onnx.save(model, root / "export" / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    build(root, tmp_path / "engine", calibrated=mode == "static", mode=mode)
    build(sentence_model, tmp_path / "plain", calibrated=mode == "static", mode=mode)
    np.testing.assert_array_equal(embeddings(tmp_path / "engine"), embeddings(tmp_path / "plain"))


def test_images_in_int8(tmp_path: Path) -> None:
    """Every product becomes int8, whatever the architecture; the engine's figures stay near fp32's."""
    models.vit(tmp_path / "model")
    root = exported(tmp_path)
    engine = build(root, tmp_path / "engine")
    assert engine["quantization"]["products_fp32"] == 0
    pixels = {"pixel_values": np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype=np.float32)}
    logits = [run(tmp_path / name / "model.onnx", None, pixels)[0] for name in ("export", "engine")]
    assert cosine(*logits) > 0.99
    (root / "calibration").mkdir()
    (root / "calibration" / "data.txt").write_text("\n".join(SENTENCES))
    with pytest.raises(RecipeError, match="pixel_values"):
        build(root, tmp_path / "static", calibrated=True, mode="static")
