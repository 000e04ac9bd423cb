"""vLLM on a CPU reads our folders: its teacher-forced log-probabilities against the reference and our own reading.

Gates. Plain weights in fp32: vLLM computes what torch computes, in another order; 1e-4 of a log-probability is fifty
times what was measured (2e-5), and a swapped tensor or a wrong RoPE base gives more than 1. Quantized: vLLM rounds
activations to the same grid as our emulation does, but sums in another order, so single activations fall on the other
side of a rounding edge; the mean difference has to stay below a third of what quantization itself costs, and a wrong
scale, packing or activation rule is as large as that cost or larger. W8A8 in bf16, where AMX leaves no other: half
precision itself costs plain weights 7e-3 and these 1.1e-2, as much as the quantization; within twice the former.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import hardware
from pipeline.engine import Sampling, completions
from pipeline.stages.llm.scheme import Scheme
from pipeline.stages.samples import load_encoder, windows
from pipeline.targets.llm_torch import open_dequantized, open_transformers
from pipeline.targets.vllm_engine import Remote
from tests.e2e.harness import DATA, MODEL
from tests.stages import llm

PYTHON = os.environ.get("ENGINEWRIGHT_TOOLCHAIN_VLLM_CPU", "")
pytestmark = [
    pytest.mark.optin,
    pytest.mark.skipif(not PYTHON, reason="another environment: set ENGINEWRIGHT_TOOLCHAIN_VLLM_CPU"),
]
AMX = "amx_int8" in hardware.probe().isa  # there vLLM's int8 kernel takes no fp32
SCHEMES: dict[str, tuple[Scheme, str]] = {
    "plain": (Scheme(layout="plain", dtype="bf16"), "float32"),
    "w8a8": (Scheme(layout="w8a8", dtype="bf16", method="rtn"), "bfloat16" if AMX else "float32"),
    "fp8": (Scheme(layout="fp8", dtype="bf16", method="rtn"), "float32"),
    "w4a16": (Scheme(layout="w4a16", dtype="bf16", method="rtn", group_size=128), "bfloat16"),
}


def log_probs(logits: Any) -> Any:
    """Over the vocabulary, float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def of_tokens(logits: Any, ids: Any) -> Any:
    """The log-probability of every next token."""
    return np.take_along_axis(log_probs(logits)[:, :-1], ids[:, 1:, None], axis=2)[..., 0]


def saved(scheme: Scheme, place: Path) -> Path:
    """The folder that vLLM loads."""
    folder = llm.quantize(MODEL, scheme, place) / "weights"
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / file).write_bytes((MODEL / file).read_bytes())
    return folder


@pytest.mark.parametrize("name", SCHEMES)
def test_its_log_probabilities_are_ours(name: str, tmp_path: Path) -> None:
    if name == "w4a16" and "avx512f" not in hardware.probe().isa:
        pytest.skip("vLLM's 4-bit kernel for CPUs is built for AVX-512, which this machine lacks")
    if name == "w8a8" and not {"avx512_vnni", "avx_vnni"} & set(hardware.probe().isa):
        # Measured on AVX2: mean difference 1.5e-2, where quantization itself costs 9.5e-3; why is not known yet.
        pytest.xfail("vLLM's int8 product on a CPU without VNNI is not the exact one")
    scheme, dtype = SCHEMES[name]
    folder = saved(scheme, tmp_path / "out")
    ids = windows(DATA / "pydoc-heldout.txt", load_encoder(MODEL, 4096), 4, 128)
    vllm = Remote(PYTHON, folder, {"dtype": dtype, "max_model_len": 256})
    theirs = of_tokens(vllm.run({"input_ids": ids})["logits"], ids)
    ours = of_tokens(open_dequantized(folder, {"activations": "vllm"}).run({"input_ids": ids})["logits"], ids)
    source = of_tokens(open_transformers(MODEL, {"dtype": "float32"}).run({"input_ids": ids})["logits"], ids)
    between, cost = np.abs(theirs - ours), np.abs(ours - source)
    told = f"{name}: vLLM - ours max {between.max():.2e} mean {between.mean():.2e}; ours - source {cost.mean():.2e}"
    warnings.warn(told, stacklevel=1)  # the figures, for whoever runs it
    if name == "plain":
        assert between.max() < 1e-4
    elif name == "w8a8" and AMX:
        plain = Remote(PYTHON, saved(SCHEMES["plain"][0], tmp_path / "plain"), {"dtype": dtype, "max_model_len": 256})
        floor = np.abs(of_tokens(plain.run({"input_ids": ids})["logits"], ids) - source)
        assert between.mean() < 2 * floor.mean()
    else:
        assert between.mean() < cost.mean() / 3
    prompts = [ids[0, :12].tolist(), ids[1, :20].tolist()]
    answers = completions(vllm, prompts, Sampling(max_new_tokens=4, eos_token_ids=()))
    assert [len(answer) for answer in answers] == [4, 4]
    if name == "plain":
        engine = open_transformers(MODEL, {"dtype": "float32"})
        assert answers == completions(engine, prompts, Sampling(max_new_tokens=4, eos_token_ids=()))
