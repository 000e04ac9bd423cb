"""Typed graphs: what their weights are, what they compute on ONNX Runtime, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from pipeline.errors import RecipeError
from pipeline.stages.onnx import torch as onnx_torch
from pipeline.stages.onnx.torch import TorchExportOptions
from pipeline.stages.tensorrt import graph as trt_graph
from pipeline.stages.tensorrt.graph import GraphOptions
from pipeline.stages.tensorrt.qdq import block_scales
from pipeline.step import silent
from pipeline.targets.trt_judge import open_engine
from tests import models


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("typed")
    models.bert(root / "model")
    for name in ("export", "calibration"):
        (root / name).mkdir()
    onnx_torch.run({"model": root / "model"}, TorchExportOptions(), root / "export", silent)
    (root / "calibration" / "data.txt").write_text("\n".join(models.CORPUS * 8))
    return {name: root / name for name in ("model", "export", "calibration")}


def typed(exported: dict[str, Path], out: Path, **options: Any) -> Path:
    out.mkdir()
    trt_graph.run(exported, GraphOptions(samples=8, length=16, **options), out, silent)
    return out


def values(folder: Path) -> dict[str, Any]:
    return {t.name: t for t in onnx.load_model(folder / "model.onnx").graph.initializer}


def outputs(folder: Path) -> np.ndarray:
    ids = np.arange(5, 5 + 24).reshape(2, 12)
    return open_engine(folder).run({"input_ids": ids})["last_hidden_state"]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("precision", "least", "kind"),
    [("fp16", 0.99999, 10), ("bf16", 0.999, 16), ("int8", 0.995, 3), ("fp8", 0.98, 17), ("int4", 0.98, 22)],
)
def test_every_precision_computes_what_fp32_does(
    exported: dict[str, Path], tmp_path: Path, precision: Any, least: float, kind: int
) -> None:
    whole = outputs(typed(exported, tmp_path / "fp32", precision="fp32"))
    folder = typed(exported, tmp_path / precision, precision=precision)
    onnx.checker.check_model(str(folder / "model.onnx"))
    found = outputs(folder)
    assert cosine(found, whole) > least
    assert not np.array_equal(found, whole)
    kinds = {tensor.data_type for tensor in values(folder).values()}
    assert kind in kinds
    assert onnx.TensorProto.FLOAT not in kinds  # strongly typed: an fp32 tensor left over would widen what follows
    about = json.loads((folder / "engine.json").read_text())
    assert about["precision"] == precision
    if precision in ("int8", "fp8", "int4"):
        assert about["quantization"]["products"] == 12  # 2 layers: query, key, value, out, up, down


def test_int8_weights_are_the_nearest_codes_of_their_channel(exported: dict[str, Path], tmp_path: Path) -> None:
    import safetensors.numpy

    found = values(typed(exported, tmp_path / "out", precision="int8"))
    weights = safetensors.numpy.load_file(exported["model"] / "model.safetensors")
    name = next(key for key in found if key.endswith("intermediate.dense.int8"))
    codes = onnx.numpy_helper.to_array(found[name]).astype(np.float32)
    scales = onnx.numpy_helper.to_array(found[f"{name}.scale"]).astype(np.float32)
    source = next(
        v for k, v in weights.items() if name.removeprefix("model.").removesuffix(".int8") in k and v.ndim == 2
    )
    np.testing.assert_allclose(codes * scales, source.T, atol=float(scales.max()) * 0.51)
    assert np.abs(codes).max() == 127


def test_fp8_weights_are_e4m3_of_the_scaled_weight(exported: dict[str, Path], tmp_path: Path) -> None:
    found = values(typed(exported, tmp_path / "out", precision="fp8"))
    name = next(key for key in found if key.endswith("intermediate.dense.fp8"))
    codes = np.frombuffer(found[name].raw_data, ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.isfinite(codes).all()
    assert np.abs(codes).max() == 448


def test_int4_is_packed_with_the_first_value_in_the_low_half(exported: dict[str, Path], tmp_path: Path) -> None:
    found = values(typed(exported, tmp_path / "out", precision="int4", group_size=16))
    name = next(key for key in found if key.endswith("intermediate.dense.int4"))
    tensor = found[name]
    by_onnx = onnx.numpy_helper.to_array(tensor).astype(np.int8)  # the judge of the packing
    packed = np.frombuffer(tensor.raw_data, np.uint8)
    low = ((packed & 15).astype(np.int8) ^ 8) - 8
    np.testing.assert_array_equal(by_onnx.reshape(-1)[0::2], low)
    assert list(found[f"{name}.scale"].dims) == [tensor.dims[0] // 16, tensor.dims[1]]


def test_a_searched_scale_loses_less() -> None:
    blocks = np.random.default_rng(0).standard_normal((64, 4, 32)).astype(np.float32)

    def loss(search: bool) -> float:
        scales = block_scales(blocks, search=search)[..., None]
        wrong = np.clip(np.rint(blocks / scales), -8, 7) * scales - blocks
        return float((blocks**2 * wrong**2).sum())

    assert loss(search=True) < 0.9 * loss(search=False)
    assert (block_scales(np.zeros((1, 1, 32), np.float32), search=True) > 0).all()


def test_excluded_products_stay(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = typed(exported, tmp_path / "out", precision="int8", exclude=("*layer.0.*",))
    about = json.loads((folder / "engine.json").read_text())["quantization"]
    assert (about["products"], about["products_kept"]) == (6, 6)
    with pytest.raises(RecipeError, match="matches no matrix product"):
        typed(exported, tmp_path / "none", precision="int8", exclude=("*lm_head*",))


def test_no_calibration_data_no_quantization(exported: dict[str, Path], tmp_path: Path) -> None:
    without = {name: exported[name] for name in ("model", "export")}
    with pytest.raises(RecipeError, match="calibration data"):
        typed(without, tmp_path / "out", precision="fp8")


def test_equal_inputs_give_equal_bytes(exported: dict[str, Path], tmp_path: Path) -> None:
    one, two = (typed(exported, tmp_path / name, precision="int8") / "model.onnx" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
