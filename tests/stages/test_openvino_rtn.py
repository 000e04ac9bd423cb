"""Our rounding against NNCF's own, bit for bit: levels, scales and zero points of every mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

ov = pytest.importorskip("openvino")
pytest.importorskip("nncf")

from pipeline.stages.openvino import compress as openvino_compress  # noqa: E402
from pipeline.stages.openvino import weights as openvino_weights  # noqa: E402
from pipeline.stages.openvino.compress import CompressOptions  # noqa: E402
from pipeline.stages.openvino.rtn import round_to_nearest  # noqa: E402
from pipeline.stages.openvino.weights import Compression, DecoderOptions  # noqa: E402
from pipeline.step import silent  # noqa: E402
from tests.stages.decoders import write_decoder  # noqa: E402

CASES = {
    "int8": ("int8", Compression()),
    "int8-sym": ("int8", Compression(backup="int8_sym")),
    "int4-sym": ("int4", Compression(group_size=32, symmetric=True)),
    "int4-asym": ("int4", Compression(group_size=64)),
    "int4-all": ("int4", Compression(group_size=32, head="int4", embeddings="int4", backup="int8_sym")),
}


def constants(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> (type, shape, bytes) of every integer constant with its scale and zero point."""
    model = ov.Core().read_model(folder / "openvino_model.xml")
    found = {}
    for node in model.get_ops():
        name = node.get_friendly_name()
        if node.get_type_name() != "Constant" or not (name.endswith((".weight", "/scale", "/zero_point"))):
            continue
        kind = node.get_output_element_type(0).get_type_name()
        if kind in ("u4", "i4", "u8", "i8", "f16"):
            data: Any = node.data if kind not in ("u4", "i4") else node.get_data()
            found[name] = (kind, tuple(node.shape), np.ascontiguousarray(data).tobytes())
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_constants_are_nncfs(case: str, tmp_path: Path) -> None:
    precision, compression = CASES[case]
    # Large enough for NNCF's fast path, which compiles its arithmetic; the small ones take the other.
    model = write_decoder(tmp_path / "model", "Llama", hidden_size=128, intermediate_size=256, vocab_size=512)
    for name, options in (
        ("plain", DecoderOptions()),
        ("ours", DecoderOptions(precision=precision, compression=compression)),
    ):
        (tmp_path / name).mkdir()
        openvino_weights.run({"model": model}, options, tmp_path / name, silent)
    (tmp_path / "theirs").mkdir()
    told = CompressOptions(precision=precision, compression=compression)
    openvino_compress.run({"model": model, "ir": tmp_path / "plain"}, told, tmp_path / "theirs", silent)
    ours, theirs = constants(tmp_path / "ours"), constants(tmp_path / "theirs")
    assert len(ours) >= 2 * 16
    assert {name: value[:2] for name, value in ours.items()} == {name: value[:2] for name, value in theirs.items()}
    different = [name for name in ours if ours[name][2] != theirs[name][2]]
    assert not different


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_comes_back_is_within_half_a_step(bits: int, symmetric: bool) -> None:
    weight_NK = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    weight_NK[1] = 0
    weight_NK[2] = np.abs(weight_NK[2])
    found = round_to_nearest(weight_NK, bits, 32, symmetric=symmetric)
    flat = found.levels
    levels = np.stack([flat & 15, flat >> 4], -1).reshape(-1) if bits == 4 else flat
    whole = levels.astype(np.int32).reshape(6, 2, 32)
    if symmetric:
        half = 1 << (bits - 1)
        whole = np.where(whole >= half, whole - 2 * half, whole)
    else:
        assert found.zeros is not None
        zeros = found.zeros
        zeros = np.stack([zeros & 15, zeros >> 4], -1).reshape(-1) if bits == 4 else zeros
        whole = whole - zeros.astype(np.int32).reshape(6, 2, 1)
    back = (whole * found.scales.astype(np.float32)).reshape(6, 64)
    step = np.abs(found.scales.astype(np.float32)).repeat(32, -1).reshape(6, 64)
    # A step more at the end of a symmetric range: the other sign has one level less.
    assert (np.abs(back - weight_NK) <= step * (1.01 if symmetric else 0.52) + 1e-6).all()
    assert not back[1].any()
