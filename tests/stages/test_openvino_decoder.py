"""Our builder of stateful OpenVINO decoders against transformers: every family, every padding, prefill and decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

ov = pytest.importorskip("openvino")

from pipeline.errors import StageError, UnavailableError  # noqa: E402
from pipeline.stages.openvino import weights as openvino_weights  # noqa: E402
from pipeline.stages.openvino.settings import Settings, properties  # noqa: E402
from pipeline.stages.openvino.weights import Compression, DecoderOptions  # noqa: E402
from pipeline.step import silent  # noqa: E402
from tests.stages.decoders import CASES, PADDINGS, SIZES, reference, reference_logits, write_decoder  # noqa: E402

PLAIN = properties(Settings(threads=1), decoder=True)


def build(model: Path, out: Path, **options: Any) -> Path:
    out.mkdir(parents=True)
    openvino_weights.run({"model": model}, DecoderOptions(**options), out, silent)
    return out


def request(folder: Path) -> Any:
    return ov.Core().compile_model(folder / "openvino_model.xml", "CPU", PLAIN).create_infer_request()


def step(run: Any, ids: Any, mask: Any, rows: Any = None) -> Any:
    """Logits [B, S, V] of one call; the cache is in the request."""
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
    beams = np.arange(len(ids), dtype=np.int32) if rows is None else np.array(rows, np.int32)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "beam_idx": beams}
    return np.array(run.infer(given)["logits"])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Case -> (OpenVINO request, torch model), built when first asked for."""

    class Builder(dict[str, tuple[Any, Any]]):
        def __missing__(self, case: str) -> tuple[Any, Any]:
            kind, over = CASES[case]
            layers = 7 if case == "gemma3_text" else 2  # the sixth layer is the first full one
            path = tmp_path_factory.mktemp(case)
            model = write_decoder(path / "model", kind, **({"num_hidden_layers": layers} | over))
            self[case] = request(build(model, path / "engine")), reference(model)
            return self[case]

    return Builder()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(built: dict[str, tuple[Any, Any]], case: str) -> None:
    run, torch_model = built[case]
    for left, right in PADDINGS.values():
        run.reset_state()
        random = np.random.default_rng(1)
        rows, length, vocabulary = len(left), 20, SIZES["vocab_size"]
        ids = random.integers(5, vocabulary, (rows, length))
        mask = np.ones((rows, length), np.int64)
        for row, (before, behind) in enumerate(zip(left, right, strict=True)):
            mask[row, :before] = 0
            mask[row, length - behind :] = 0
        logits = step(run, ids, mask)
        expected = reference_logits(torch_model, ids, mask)
        assert expected.std() > 0.5  # the comparison means something
        assert np.abs(logits - expected)[mask == 1].max() < 1e-4
        for _ in range(3):
            token = random.integers(5, vocabulary, (rows, 1))
            ids, mask = np.concatenate([ids, token], 1), np.concatenate([mask, np.ones((rows, 1), np.int64)], 1)
            logits = step(run, token, mask)
            expected = reference_logits(torch_model, ids, mask)
            assert np.abs(logits[:, 0] - expected[:, -1]).max() < 1e-4


@pytest.mark.parametrize("case", ["llama", "mistral-window", "gemma2"])
def test_the_cache_follows_the_beams(built: dict[str, tuple[Any, Any]], case: str) -> None:
    """Rows may be permuted, repeated and dropped by beam_idx, and a prompt may come in chunks."""
    run, torch_model = built[case]
    run.reset_state()
    ids = np.random.default_rng(2).integers(5, SIZES["vocab_size"], (3, 14))
    step(run, ids[:, :9], np.ones((3, 9), np.int64))
    rows = [2, 0, 0, 1]
    chosen = ids[rows]
    logits = step(run, chosen[:, 9:], np.ones((4, 14), np.int64), rows)
    assert np.abs(logits - reference_logits(torch_model, chosen, np.ones_like(chosen))[:, 9:]).max() < 1e-4
    token = chosen[[3, 0], -1:]
    logits = step(run, token, np.ones((2, 15), np.int64), [3, 0])
    whole = np.concatenate([chosen[[3, 0]], token], 1)
    assert np.abs(logits[:, 0] - reference_logits(torch_model, whole, np.ones_like(whole))[:, -1]).max() < 1e-4


def test_what_plugins_fuse_is_fused(built: dict[str, tuple[Any, Any]]) -> None:
    """Another shape of the same arithmetic would be right and slow."""
    run, _ = built["llama"]
    kinds = [
        node.get_rt_info()["layerType"].astype(str) for node in run.get_compiled_model().get_runtime_model().get_ops()
    ]
    assert kinds.count("RoPE") == 4 and kinds.count("RMS") == 5
    assert kinds.count("ScaledDotProductAttention") == 2 and kinds.count("MemoryInput") == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_floats_are_stored_as_they_are_asked_for(dtype: str, precision: str, tmp_path: Path) -> None:
    model = write_decoder(tmp_path / "model", "Qwen3", dtype=dtype, head_dim=32, tie_word_embeddings=True)
    folder = build(model, tmp_path / "engine", precision=precision)
    ids = np.random.default_rng(3).integers(5, SIZES["vocab_size"], (2, 12))
    expected = reference_logits(reference(model), ids, np.ones_like(ids))
    gap = np.abs(step(request(folder), ids, np.ones_like(ids)) - expected).max()
    # bf16's eight bits fit into fp16, where the exponent does.
    exact = precision == "fp32" or dtype == "bfloat16" or dtype == {"bf16": "bfloat16", "fp16": "float16"}[precision]
    assert gap < 1e-4 if exact else 1e-4 < gap < 0.3
    stored = {
        n.get_output_element_type(0).get_type_name()
        for n in ov.Core().read_model(folder / "openvino_model.xml").get_ops()
        if n.get_friendly_name().endswith("proj.weight")
    }
    assert stored == {{"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[precision]}
    # Plugins keep the weights so; without the mark they would make fp32 of them.
    compiled = ov.Core().compile_model(folder / "openvino_model.xml", "CPU", PLAIN)
    kept = {
        node.get_rt_info()["runtimePrecision"].astype(str)
        for node in compiled.get_runtime_model().get_ops()
        if "q_proj.weight" in node.get_friendly_name()
    }
    assert kept == stored


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    tied = build(write_decoder(tmp_path / "a", "Qwen3", tie_word_embeddings=True), tmp_path / "tied", precision="int4")
    apart = build(write_decoder(tmp_path / "b", "Qwen3"), tmp_path / "apart", precision="int4")
    mixed = build(tmp_path / "a", tmp_path / "mixed", precision="int4", compression=Compression(head="int4"))
    sizes = [(folder / "openvino_model.bin").stat().st_size for folder in (tied, mixed, apart)]
    assert sizes[0] < sizes[1] < sizes[2]
    request(mixed)


def test_the_same_bytes_whatever_the_process_did_before(tmp_path: Path) -> None:
    model = write_decoder(tmp_path / "model", "Gemma2", head_dim=32)
    folders = [build(model, tmp_path / name, precision="int4", compression=Compression()) for name in ("a", "b")]
    for file in folders[0].iterdir():
        assert file.read_bytes() == (folders[1] / file.name).read_bytes(), file.name


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model = write_decoder(tmp_path / "model", "Llama")
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "model.layers.0.self_attn.extra": np.zeros(3, np.float32)}, model / "model.safetensors")
    with pytest.raises(UnavailableError, match=r"no place for the tensor 'model\.layers\.0\.self_attn\.extra'"):
        build(model, tmp_path / "a")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(StageError, match=r"no tensor 'model\.norm\.weight'"):
        build(model, tmp_path / "b")
