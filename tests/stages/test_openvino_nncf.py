"""What NNCF does with calibration data: encoders in full int8, decoders by AWQ, scale estimation, GPTQ and a ratio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

ov = pytest.importorskip("openvino")
pytest.importorskip("nncf")

from pipeline.errors import RecipeError  # noqa: E402
from pipeline.stages.onnx import torch as onnx_torch  # noqa: E402
from pipeline.stages.openvino import compress as openvino_compress  # noqa: E402
from pipeline.stages.openvino import convert as openvino_convert  # noqa: E402
from pipeline.stages.openvino import ptq as openvino_ptq  # noqa: E402
from pipeline.stages.openvino import weights as openvino_weights  # noqa: E402
from pipeline.stages.openvino.weights import Compression  # noqa: E402
from pipeline.step import silent  # noqa: E402
from tests import models  # noqa: E402
from tests.conftest import ROOT  # noqa: E402

DATA = ROOT / "recipes" / "data"
SHIPPED = ROOT / "recipes" / "models" / "pydoc-llama"
pytestmark = pytest.mark.slow


def made(out: Path, stage: Any, options: Any, inputs: dict[str, Path]) -> Path:
    out.mkdir()
    stage.run(inputs, options, out, silent)
    return out


def calibration(root: Path, name: str) -> Path:
    root.mkdir()
    (root / "data.txt").write_bytes((DATA / name).read_bytes())
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny sentence encoder in fp32, with calibration data."""
    root = tmp_path_factory.mktemp("encoder")
    model = models.sentence_transformer(root / "model")
    exported = made(root / "export", onnx_torch, onnx_torch.TorchExportOptions(), {"model": model})
    ir = made(root / "ir", openvino_convert, openvino_convert.ConvertOptions(), {"model": model, "export": exported})
    return {"model": model, "ir": ir, "calibration": calibration(root / "data", "sentences-calibration.txt")}


def quantizers(folder: Path) -> int:
    model = ov.Core().read_model(folder / "openvino_model.xml")
    return sum(node.get_type_name() == "FakeQuantize" for node in model.get_ops())


def test_accuracy_control_gives_layers_back(encoder: dict[str, Path], tmp_path: Path) -> None:
    options = {"samples": 8, "length": 32}
    plain = made(tmp_path / "plain", openvino_ptq, openvino_ptq.PtqOptions(**options), encoder)
    loose = made(tmp_path / "loose", openvino_ptq, openvino_ptq.PtqOptions(max_drop=0.5, **options), encoder)
    tight = made(tmp_path / "tight", openvino_ptq, openvino_ptq.PtqOptions(max_drop=1e-6, **options), encoder)
    assert quantizers(plain) == quantizers(loose) > quantizers(tight)


def test_ptq_of_too_little_data_is_refused(encoder: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="samples"):
        made(tmp_path / "out", openvino_ptq, openvino_ptq.PtqOptions(samples=100_000), encoder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped Llama in fp32, with calibration data."""
    root = tmp_path_factory.mktemp("decoder")
    ir = made(root / "ir", openvino_weights, openvino_weights.DecoderOptions(), {"model": SHIPPED})
    return {"model": SHIPPED, "ir": ir, "calibration": calibration(root / "data", "pydoc-calibration.txt")}


def constants(folder: Path) -> dict[str, bytes]:
    """Name -> the bytes of every 4-bit constant."""
    model = ov.Core().read_model(folder / "openvino_model.xml")
    return {
        node.get_friendly_name(): np.ascontiguousarray(node.get_data()).tobytes()
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and node.get_output_element_type(0).get_type_name() == "u4"
    }


@pytest.mark.parametrize("method", [{"awq": True}, {"scale_estimation": True}, {"gptq": True}, {"ratio": 0.5}], ids=str)
def test_each_method_does_something_of_its_own(
    decoder: dict[str, Path], method: dict[str, Any], tmp_path: Path
) -> None:
    rtn = openvino_weights.DecoderOptions(precision="int4", compression=Compression())
    nearest = constants(made(tmp_path / "rtn", openvino_weights, rtn, {"model": SHIPPED}))
    told = openvino_compress.CompressOptions(compression=Compression(**method), samples=4, length=64)
    found = constants(made(tmp_path / "out", openvino_compress, told, decoder))
    if "ratio" in method:
        assert 0 < len(found) < len(nearest)
    else:
        assert set(found) == set(nearest)
        assert any(found[name] != nearest[name] for name in found)
