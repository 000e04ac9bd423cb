"""The validator: what LMDeploy's own loader accepts though it is wrong, and what it rejects, is refused here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import VerificationError
from pipeline.stages.llm import check as llm_check
from pipeline.stages.llm.scheme import Scheme
from tests import models
from tests.stages import llm

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
DOWN, Q = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"
LAYOUTS = {
    "w4a16": Scheme(layout="w4a16", dtype="bf16", method="awq", group_size=128),
    "awq": Scheme(layout="awq", dtype="fp16", method="awq", group_size=128, symmetric=False),
    "gptq": Scheme(layout="gptq", dtype="fp16", method="rtn", group_size=128),
    "w8a8": Scheme(layout="w8a8", dtype="bf16", method="smoothquant"),
    "fp8": Scheme(layout="fp8", dtype="bf16", method="rtn"),
    "fp8-block": Scheme(layout="fp8-block", dtype="bf16", method="rtn"),
}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2: the linears q, k and v have biases."""
    over = {**llm.WIDE, "num_key_value_heads": 4, "tie_word_embeddings": False}
    return models.qwen2(tmp_path_factory.mktemp("qwen2") / "model", **over)


@pytest.fixture(scope="session")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("made")
    observed = llm.observe(source, place / "observed")
    return {name: llm.quantize(source, scheme, place / name, observed) for name, scheme in LAYOUTS.items()}


def damaged(
    made: Path, out: Path, tensors: Callable[[Tensors], Any] | None, config: Callable[[Config], Any] | None
) -> Path:
    """A copy with all tensors in one file, changed in place by the functions."""
    out.mkdir()
    held: Tensors = {}
    for shard in sorted((made / "weights").glob("*.safetensors")):
        held |= load_file(shard)
    if tensors:
        tensors(held)
    save_file({name: value.contiguous() for name, value in held.items()}, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    told = json.loads((made / "weights" / "config.json").read_text())
    if config:
        config(told)
    (out / "config.json").write_text(json.dumps(told))
    return out


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def change(name: str, by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: by(tensors[name])})


def quantization(**fields: Any) -> Callable[[Config], Any]:
    return lambda config: config["quantization_config"].update(fields)


def weights(**fields: Any) -> Callable[[Config], Any]:
    return lambda config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(fields)


def swapped(packed: torch.Tensor) -> torch.Tensor:
    """The two values of every byte change places."""
    raw = packed.contiguous().view(torch.uint8)
    return ((raw >> 4) | (raw << 4)).view(torch.int32)


def nan(scale: torch.Tensor) -> torch.Tensor:
    scale = scale.clone()
    scale.view(-1)[0] = torch.nan
    return scale


Change = tuple[str, Callable[[Tensors], Any] | None, Callable[[Config], Any] | None, str]
ACCEPTED_BY_LMDEPLOY: dict[str, Change] = {
    "missing bias": ("awq", drop(f"{Q}.bias"), None, "q_proj.bias: is missing"),
    "extra tensor": (
        "awq", lambda t: t.update({"model.layers.1.mlp.extra.weight": torch.zeros(4)}), None, "extra.weight: does not",
    ),
    "qweight with wrong K": ("awq", change(f"{DOWN}.qweight", lambda q: q[:128]), None, "has shape [128, 16]"),
    "swapped nibbles": ("awq", change(f"{DOWN}.qweight", swapped), None, "its weights are off by"),
    "shifted nibbles": ("awq", change(f"{DOWN}.qweight", lambda q: q >> 4), None, "off by"),
    "bits: 8": ("awq", None, quantization(bits=8), "quantization_config.bits: is 8"),
    "zero_point: false": ("awq", None, quantization(zero_point=False), "quantization_config.zero_point: is False"),
    "wrong intermediate_size": ("awq", None, lambda c: c.update(intermediate_size=384), "config.json makes it [384"),
}  # fmt: skip
OTHERS: dict[str, Change] = {
    "missing zeros": ("awq", drop(f"{DOWN}.qzeros"), None, "qzeros: is missing"),
    "missing scales": ("awq", drop(f"{DOWN}.scales"), None, "scales: is missing"),
    "missing norm": ("awq", drop("model.norm.weight"), None, "model.norm.weight: is missing"),
    "missing head": ("awq", drop("lm_head.weight"), None, "lm_head.weight: is missing"),
    "renamed": ("awq", lambda t: t.update({"model.x": t.pop(f"{DOWN}.qweight")}), None, "model.x: does not belong"),
    "scales of another type": ("awq", change(f"{DOWN}.scales", lambda s: s.bfloat16()), None, "has type BF16"),
    "groups lost": ("awq", change(f"{DOWN}.scales", lambda s: s[:1]), None, "has shape [1, 128]"),
    "a scale that is NaN": ("awq", change(f"{DOWN}.scales", nan), None, "NaN|nan"),
    "a negative scale": ("w8a8", change(f"{DOWN}.weight_scale", lambda s: -s), None, "not a positive number"),
    "version gemv": ("awq", None, quantization(version="gemv"), "quantization_config.version"),
    "version in capitals": ("awq", None, quantization(version="GEMM"), "quantization_config.version"),
    "group_size 64": ("awq", None, quantization(group_size=64), "quantization_config.group_size: is 64"),
    "another method": ("awq", None, quantization(quant_method="bitsandbytes"), "bitsandbytes"),
    "method gptq": ("awq", None, quantization(quant_method="gptq"), "quantization_config"),
    "no quantization_config": ("awq", None, lambda c: c.pop("quantization_config"), "qweight: does not belong"),
    "another architecture": ("awq", None, lambda c: c.update(architectures=["FooForCausalLM"]), "architectures"),
    "unknown model_type": ("awq", None, lambda c: c.update(model_type="foo"), "foo"),
    "more layers": ("awq", None, lambda c: c.update(num_hidden_layers=3), "layers.2"),
    "desc_act": ("gptq", None, quantization(desc_act=True), "desc_act"),
    "gptq_v2": ("gptq", None, quantization(checkpoint_format="gptq_v2"), "checkpoint_format"),
    "zero points as gptq_v2 stores them": (
        "gptq", change(f"{DOWN}.qzeros", lambda z: z + 0x11111111), None, "off by",
    ),
    "groups out of order": ("gptq", change(f"{DOWN}.g_idx", lambda g: g.flip(0)), None, "not in order"),
    "two groups": (
        "w4a16", None, lambda c: c["quantization_config"]["config_groups"].update(group_1={}), "config_groups",
    ),
    "num_bits as a truth": ("w4a16", None, weights(num_bits=True), "num_bits"),
    "dynamic group order": ("w4a16", None, weights(actorder="group"), "actorder"),
    "symmetric without zeros": ("w4a16", None, weights(symmetric=False), "weight_zero_point: is missing"),
    "head not ignored": ("w4a16", None, quantization(ignore=[]), "quantization_config.ignore"),
    "wrong weight_shape": (
        "w4a16", change(f"{DOWN}.weight_shape", lambda s: s.flip(0)), None, "weight_shape: says [256, 128]",
    ),
    "swapped in compressed-tensors": ("w4a16", change(f"{DOWN}.weight_packed", swapped), None, "off by"),
    "a norm that was not divided": (
        "w8a8", change("model.layers.0.input_layernorm.weight", torch.ones_like), None, "is not the source's norm",
    ),
    "one channel wrong": (
        "w8a8", change(f"{DOWN}.weight", lambda w: torch.cat([-w[:1], w[1:]])), None, "off by",
    ),
    "fp8 that is NaN": (
        "fp8", change(f"{DOWN}.weight", lambda w: (w.view(torch.uint8) | 0x7F).view(w.dtype)), None, "NaN",
    ),
    "blocks of another size": ("fp8-block", None, quantization(weight_block_size=[64, 64]), "weight_block_size"),
    "transposed blocks": (
        "fp8-block", change(f"{DOWN}.weight_scale_inv", lambda s: s.T), None, "weight_scale_inv: has shape",
    ),
    "an edited embedding": ("fp8", change("model.embed_tokens.weight", lambda w: w * 1.5), None, "differs from the"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_made_is_valid(layout: str, made: dict[str, Path], source: Path, tmp_path: Path) -> None:
    folder = damaged(made[layout], tmp_path / "out", None, None)
    assert list(llm_check.examine(folder, source, made[layout] / "folds", LAYOUTS[layout].method)) == []


@pytest.mark.parametrize("name", [*ACCEPTED_BY_LMDEPLOY, *OTHERS])
def test_what_is_wrong_is_refused(name: str, made: dict[str, Path], source: Path, tmp_path: Path) -> None:
    layout, tensors, config, words = {**ACCEPTED_BY_LMDEPLOY, **OTHERS}[name]
    folder = damaged(made[layout], tmp_path / "out", tensors, config)
    problems = [str(each) for each in llm_check.examine(folder, source, made[layout] / "folds", LAYOUTS[layout].method)]
    assert any(word in problem for word in words.split("|") for problem in problems), problems


def test_files_are_checked(made: dict[str, Path], source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(made["w4a16"] / "weights", folder)
    assert list(llm_check.examine(folder)) == []
    (folder / "triton_models").mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / "config.json").chmod(0o600)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"total_size": ', '"total_size": 1'))
    found = {problem.where for problem in llm_check.examine(folder)}
    assert found == {"triton_models", "pytorch_model.bin", "config.json", "model.safetensors.index.json"}
    with pytest.raises(VerificationError) as error:
        llm_check.require(folder)
    assert "triton_models" in str(error.value)
