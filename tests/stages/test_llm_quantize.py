"""The streaming quantizer: what it writes is read by others, byte for byte the same twice, and after a kill."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from pipeline.errors import EnginewrightError, RecipeError, StageError
from pipeline.stages.checkpoint import Checkpoint
from pipeline.stages.llm import check as llm_check
from pipeline.stages.llm import observe as llm_observe
from pipeline.stages.llm import quantize as llm_quantize
from pipeline.stages.llm import unpack as llm_unpack
from pipeline.stages.llm import walk as llm_walk
from pipeline.stages.llm.family import read_family
from pipeline.stages.llm.grid import Rounded, dequantize, round_weight
from pipeline.stages.llm.pack import pack
from pipeline.stages.llm.scheme import Scheme, check
from pipeline.stages.tasks import read_config
from pipeline.step import silent
from pipeline.targets.llm_torch import open_dequantized, open_transformers
from tests.stages import llm

IDS = np.arange(5, 37, dtype=np.int64).reshape(2, 16)
CALIBRATED = sorted(set(llm.FAMILIES) - {"qwen3_moe", "mixtral"})


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llm.FAMILIES["qwen3"](tmp_path_factory.mktemp("qwen3") / "model")


@pytest.fixture(scope="session")
def observed(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llm.observe(qwen3, tmp_path_factory.mktemp("observed") / "out")


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", llm.SCHEMES)
def test_every_scheme_is_valid_and_the_same_twice(name: str, qwen3: Path, observed: Path, tmp_path: Path) -> None:
    scheme = llm.SCHEMES[name]
    first = llm.quantize(qwen3, scheme, tmp_path / "first", observed)
    assert list(llm_check.examine(first / "weights", qwen3, first / "folds", scheme.method)) == []
    assert digests(first) == digests(llm.quantize(qwen3, scheme, tmp_path / "second", observed))


@pytest.mark.parametrize("name", ["w4a16", "w4a16-g32", "w4a16-awq", "w4a16-gptq", "w8a8", "fp8", "fp8-block"])
def test_transformers_reads_what_our_own_reader_reads(name: str, qwen3: Path, observed: Path, tmp_path: Path) -> None:
    """Logits equal to the last bit: two readers of one folder that share no code."""
    folder = llm.quantize(qwen3, llm.SCHEMES[name], tmp_path / "out", observed) / "weights"
    theirs = open_transformers(folder, {"dtype": "float32"}).run({"input_ids": IDS})["logits"]
    ours = open_dequantized(folder, {"activations": "none" if name == "fp8-block" else "compressed-tensors"})
    assert np.abs(theirs - ours.run({"input_ids": IDS})["logits"]).max() == 0.0


def test_pass_through_keeps_every_byte(qwen3: Path, tmp_path: Path) -> None:
    out = Checkpoint(llm.quantize(qwen3, llm.SCHEMES["plain-bf16"], tmp_path / "out") / "weights")
    for name, tensor in Checkpoint(qwen3).items():
        assert np.array_equal(tensor.numpy("native"), out[name].numpy("native"))


@pytest.mark.parametrize("layout", ["w4a16", "awq", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_unpacker_that_shares_no_code_agrees(layout: Any, symmetric: bool, tmp_path: Path) -> None:
    from pipeline.stages.llm.shards import ready, write_shard

    torch.manual_seed(1)
    scheme = Scheme(layout=layout, dtype="fp16", method="rtn", group_size=32, symmetric=symmetric)
    codes = torch.randint(0, 16, (24, 64), dtype=torch.uint8)
    zero = torch.full((24, 2), 8) if symmetric else torch.randint(1, 16, (24, 2))
    rounded = Rounded(codes, torch.rand(24, 2).half(), zero.to(torch.uint8))
    packed = pack("x", rounded, scheme)
    write_shard(tmp_path / "model.safetensors", [ready(*each) for each in packed.items()])
    stored = Checkpoint(tmp_path)
    assert np.array_equal(llm_unpack.codes(stored, "x", layout), codes.numpy())
    assert np.array_equal(llm_unpack.weight(stored, "x", layout), dequantize(rounded).numpy())
    if layout == "w4a16":  # the format's own library
        theirs = unpack_from_int32(packed["x.weight_packed"], 4, codes.shape)
        assert np.array_equal(theirs.numpy() + 8, codes.numpy())


def test_e4m3_is_what_torch_says() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(llm_unpack._E4M3, every, equal_nan=True)


@pytest.mark.parametrize("family", llm.FAMILIES)
def test_every_family_is_quantized_and_validated(family: str, tmp_path: Path) -> None:
    model = llm.FAMILIES[family](tmp_path / "model")
    out = llm.quantize(model, llm.SCHEMES["w4a16-g32"], tmp_path / "out")
    assert list(llm_check.examine(out / "weights", model, out / "folds", "rtn")) == []


@pytest.mark.parametrize("family", CALIBRATED)
def test_the_walk_is_the_models_own_forward(family: str, tmp_path: Path) -> None:
    """Layer by layer with weights read one at a time: the same hidden states as the whole model gives."""
    folder = llm.FAMILIES[family](tmp_path / "model")
    seen: list[torch.Tensor] = []

    def visit(index: int, layer: Any, hidden_STH: torch.Tensor, forward: Any) -> torch.Tensor:
        seen.append(forward())
        return seen[-1]

    llm_walk.walk(folder, read_family(read_config(folder)), torch.from_numpy(IDS), visit)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        hidden = model.model(torch.from_numpy(IDS)).last_hidden_state
    assert torch.equal(model.model.norm(seen[-1]), hidden)


@pytest.mark.parametrize("family", CALIBRATED)
def test_folding_changes_no_answer(family: str, tmp_path: Path) -> None:
    """A model whose scales were moved, at 8 bits: nearly the model it was; a fold in the wrong place would show."""
    folder = llm.FAMILIES[family](tmp_path / "model")
    scheme = Scheme(layout="w8a8", dtype="bf16", method="smoothquant")
    out = llm.quantize(folder, scheme, tmp_path / "out")
    assert list(llm_check.examine(out / "weights", folder, out / "folds", "smoothquant")) == []
    logits = open_dequantized(out, {}).run({"input_ids": IDS})["logits"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        reference = model(torch.from_numpy(IDS)).logits.numpy()
    assert np.linalg.norm(logits - reference) < 0.1 * np.linalg.norm(reference)


class Cut(Exception):  # noqa: N818
    """A kill."""


@pytest.mark.parametrize("name", ["w4a16", "w4a16-gptq"])
def test_a_stage_that_was_cut_off_goes_on(name: str, qwen3: Path, tmp_path: Path) -> None:
    whole = llm.quantize(qwen3, llm.SCHEMES[name], tmp_path / "whole")
    told = llm_quantize.QuantizeOptions(scheme=llm.SCHEMES[name], samples=4, length=32)
    inputs = {"model": qwen3, "calibration": llm.text_at(tmp_path / "text")}
    out = tmp_path / "cut"
    out.mkdir()

    def until(layer: int) -> Any:
        def progress(done: float, total: float = 0, note: str = "") -> None:
            if done == layer:
                raise Cut

        return progress

    with pytest.raises(Cut):
        llm_quantize.run(inputs, told, out, until(1))
    shards = {path: path.stat().st_ino for path in (out / "weights").glob("model-0000[12]*")}
    assert len(shards) == 2  # embeddings and layer 0
    (out / "weights" / "model-00003-of-00004.safetensors.part").write_bytes(b"half")
    visited: list[float] = []
    llm_quantize.run(inputs, told, out, lambda done, total=0, note="": visited.append(done))
    assert visited == [1, 2]
    assert {path: path.stat().st_ino for path in shards} == shards
    assert digests(out) == digests(whole)


def test_observing_goes_on_too(qwen3: Path, observed: Path, tmp_path: Path) -> None:
    inputs = {"model": qwen3, "calibration": llm.text_at(tmp_path / "text")}
    told = llm_observe.ObserveOptions(samples=4, length=32)
    out = tmp_path / "out"
    out.mkdir()

    def progress(done: float, total: float = 0, note: str = "") -> None:
        if done == 1:
            raise Cut

    with pytest.raises(Cut):
        llm_observe.run(inputs, told, out, progress)
    assert (out / "carried-00000.safetensors").exists()
    llm_observe.run(inputs, told, out, silent)
    assert digests(out) == digests(observed)


def test_searched_scales_are_better_where_it_counts() -> None:
    torch.manual_seed(0)
    weight, importance = torch.randn(64, 128), torch.rand(128) ** 4
    scheme = Scheme(layout="w4a16", dtype="bf16", method="awq", group_size=32)

    def loss(rounded: Rounded) -> float:
        return float(((dequantize(rounded) - weight).square() * importance).sum())

    assert loss(round_weight(weight, scheme, importance)) < 0.95 * loss(round_weight(weight, scheme))


def refused(call: Any, kind: type[EnginewrightError], *words: str) -> None:
    with pytest.raises(kind) as error:
        call()
    for word in words:
        assert word in str(error.value)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    llama, moe = llm.FAMILIES["llama"](tmp_path / "a"), llm.FAMILIES["mixtral"](tmp_path / "b")
    dense, sparse = (read_family(read_config(path)) for path in (llama, moe))
    scheme = Scheme(layout="awq", dtype="fp16", method="awq", group_size=128, symmetric=False)
    refused(lambda: check(scheme, sparse), RecipeError, "experts", "rtn")
    refused(lambda: check(Scheme(layout="awq", dtype="fp16", method="rtn", group_size=128), dense), RecipeError, "symm")
    refused(lambda: check(Scheme(layout="gptq", dtype="fp16", method="rtn", group_size=32), dense), RecipeError, "128")
    refused(lambda: check(Scheme(layout="fp8", dtype="bf16", method="awq"), dense), RecipeError, "quantize.method")
    config = read_config(llama)
    refused(lambda: read_family({**config, "model_type": "mamba"}), EnginewrightError, "mamba", "llama")
    refused(lambda: read_family({**config, "hidden_size": None}), StageError, "hidden_size")
    refused(lambda: read_family({**config, "quantization_config": {"bits": 4}}), RecipeError, "quantized already")
    refused(
        lambda: read_family({**read_config(llm.FAMILIES["qwen3_moe"](tmp_path / "c")), "mlp_only_layers": [1]}),
        EnginewrightError,
        "mlp_only_layers",
    )


def test_tensors_that_would_be_lost_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = llm.FAMILIES["llama"](tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "model.layers.0.extra.weight": torch.zeros(2)}, model / "model.safetensors")
    refused(lambda: llm.quantize(model, llm.SCHEMES["w4a16"], tmp_path / "out"), StageError, "extra.weight")
    save_file({**tensors, "model.norm.weight": torch.full((128,), 1e9)}, model / "model.safetensors")
    refused(lambda: llm.quantize(model, llm.SCHEMES["plain-fp16"], tmp_path / "fp16"), StageError, "fp16", "bf16")
