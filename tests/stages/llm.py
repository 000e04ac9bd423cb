"""Small models for the quantizer, one a family, and the quickest way to quantize one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.stages.llm import observe as llm_observe
from pipeline.stages.llm import quantize as llm_quantize
from pipeline.stages.llm.scheme import Scheme
from pipeline.step import silent
from tests import models

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
TEXT = "\n\n".join(f"{words} number {number}" for number in range(120) for words in models.CORPUS)
SCHEMES: dict[str, Scheme] = {
    "plain-bf16": Scheme(layout="plain", dtype="bf16"),
    "plain-fp16": Scheme(layout="plain", dtype="fp16"),
    "w4a16": Scheme(layout="w4a16", dtype="bf16", method="rtn", group_size=128),
    "w4a16-g32": Scheme(layout="w4a16", dtype="bf16", method="rtn", group_size=32),
    "w4a16-asym": Scheme(layout="w4a16", dtype="bf16", method="rtn", group_size=32, symmetric=False),
    "w4a16-awq": Scheme(layout="w4a16", dtype="bf16", method="awq", group_size=32),
    "w4a16-gptq": Scheme(layout="w4a16", dtype="bf16", method="gptq", group_size=32),
    "awq": Scheme(layout="awq", dtype="fp16", method="awq", group_size=128, symmetric=False),
    "gptq": Scheme(layout="gptq", dtype="fp16", method="gptq", group_size=128),
    "w8a8": Scheme(layout="w8a8", dtype="bf16", method="smoothquant"),
    "fp8": Scheme(layout="fp8", dtype="bf16", method="rtn"),
    "fp8-block": Scheme(layout="fp8-block", dtype="bf16", method="rtn"),
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama": lambda path: models.llama(path, **WIDE, num_key_value_heads=4),
    "mistral": lambda path: models._decoder(path, "Mistral", 0, "float32", "5GB", {**WIDE, "sliding_window": 8}),
    "qwen2": lambda path: models.qwen2(path, **WIDE),
    "qwen3": lambda path: models.qwen3(path, dtype="bfloat16", num_key_value_heads=4, **WIDE),
    "gemma": lambda path: models._decoder(path, "Gemma", 0, "float32", "5GB", WIDE),
    "gemma2": lambda path: models._decoder(path, "Gemma2", 0, "float32", "5GB", {**WIDE, "sliding_window": 8}),
    "gemma3_text": lambda path: models._decoder(
        path, "Gemma3", 0, "float32", "5GB", {**WIDE, "sliding_window": 8}, text="Gemma3Text"
    ),
    "phi3": lambda path: models._decoder(path, "Phi3", 0, "float32", "5GB", WIDE),
    "qwen3_moe": lambda path: models._decoder(
        path, "Qwen3Moe", 0, "float32", "5GB",
        {**WIDE, "moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "mixtral": lambda path: models._decoder(path, "Mixtral", 0, "float32", "5GB", {**WIDE, "num_local_experts": 4}),
}  # fmt: skip


def text_at(folder: Path) -> Path:
    """A calibration folder as the fetch stage writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.txt").write_text(TEXT, "utf-8")
    return folder


def observe(model: Path, out: Path, **options: Any) -> Path:
    """What llm.observe writes of a model."""
    out.mkdir(parents=True, exist_ok=True)
    inputs = {"model": model, "calibration": text_at(out.with_name(out.name + "-text"))}
    llm_observe.run(inputs, llm_observe.ObserveOptions(**{"samples": 4, "length": 32, **options}), out, silent)
    return out


def quantize(model: Path, scheme: Scheme, out: Path, observed: Path | None = None) -> Path:
    """What llm.quantize writes of a model, calibrated where the scheme is."""
    out.mkdir(parents=True, exist_ok=True)
    inputs = {"model": model}
    if scheme.method in ("awq", "smoothquant"):
        inputs["observed"] = observed or observe(model, out.with_name(out.name + "-observed"))
    if scheme.method == "gptq":
        inputs["calibration"] = text_at(out.with_name(out.name + "-text"))
    llm_quantize.run(inputs, llm_quantize.QuantizeOptions(scheme=scheme, samples=4, length=32), out, silent)
    return out
