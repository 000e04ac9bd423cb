"""LMDeploy's own loader, walked on a CPU: it reads every tensor of our folders; what it takes wrongly we refuse."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.stages.llm import check as llm_check
from pipeline.stages.llm.scheme import Scheme
from tests import models
from tests.conftest import ROOT
from tests.stages import llm
from tests.stages.test_llm_check import ACCEPTED_BY_LMDEPLOY, LAYOUTS, OTHERS, damaged

PYTHON = os.environ.get("ENGINEWRIGHT_TOOLCHAIN_LMDEPLOY", "")
pytestmark = [
    pytest.mark.optin,
    pytest.mark.skipif(not PYTHON, reason="another environment: set ENGINEWRIGHT_TOOLCHAIN_LMDEPLOY"),
]
# What TurboMind does not need: it fuses the embedding apart, and derives shapes and groups.
IGNORED = ("model.embed_tokens.weight", ".weight_shape", ".g_idx")
WIDE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "head_dim": 128, "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
SCHEMES = {
    **{name: scheme for name, scheme in LAYOUTS.items() if name not in ("w8a8", "fp8")},
    "w4a16-g32": Scheme(layout="w4a16", dtype="fp16", method="rtn", group_size=32),
    "w4a16-asym": Scheme(layout="w4a16", dtype="fp16", method="rtn", group_size=128, symmetric=False),
    "plain": Scheme(layout="plain", dtype="bf16"),
}


def walk(*folders: str) -> list[dict[str, Any]]:
    """What LMDeploy's loader makes of each `folder@tp`."""
    done = subprocess.run(
        [PYTHON, ROOT / "tests" / "lmdeploy_dry.py", *folders], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_tensor_is_read_at_tp_1_and_2(family: str, tmp_path: Path) -> None:
    model = getattr(models, family)(tmp_path / "model", **WIDE)
    observed = llm.observe(model, tmp_path / "observed")
    folders = [llm.quantize(model, each, tmp_path / name, observed) / "weights" for name, each in SCHEMES.items()]
    found = walk(*(f"{folder}@{tp}" for folder in folders for tp in (1, 2)))
    assert len(found) == 2 * len(SCHEMES)
    for number, each in enumerate(found):
        name = [*SCHEMES][number // 2]
        assert "error" not in each, (name, each)
        assert [left for left in each["left"] if not left.endswith(IGNORED)] == [], (name, each)
        packed = "compressed-tensors" if name.startswith("w4a16") else name
        assert each["format"] == {"plain": None, "fp8-block": "fp8"}.get(name, packed), (name, each)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.qwen2(tmp_path_factory.mktemp("lmdeploy") / "model", **{**llm.WIDE, **WIDE, "num_key_value_heads": 4})


def test_what_lmdeploy_takes_our_validator_refuses(source: Path, tmp_path: Path) -> None:
    """The negative controls, through LMDeploy's loader and through ours: no damage passes both."""
    scheme = LAYOUTS["awq"]
    made = llm.quantize(source, scheme, tmp_path / "made")
    controls = {name: each for name, each in {**ACCEPTED_BY_LMDEPLOY, **OTHERS}.items() if each[0] == "awq"}
    folders = {
        n: damaged(made, tmp_path / n.replace(" ", "-").replace(":", ""), t, c) for n, (_, t, c, _) in controls.items()
    }
    found = dict(zip(folders, walk(*map(str, folders.values())), strict=True))
    taken = {name for name, each in found.items() if "error" not in each}
    refused = {n for n, f in folders.items() if list(llm_check.examine(f, source, made / "folds", scheme.method))}
    assert refused == set(controls)
    assert {"missing bias", "extra tensor", "swapped nibbles", "bits: 8", "zero_point: false"} <= taken
    assert "missing zeros" not in taken


def test_blocks_of_fp8_need_heads_of_128(tmp_path: Path) -> None:
    """Why the plan refuses it: the loader turns the rows of q and k for its rotary kernel, whole blocks at a time."""
    model = models.llama(tmp_path / "model", **{**WIDE, "head_dim": 64})
    folder = llm.quantize(model, LAYOUTS["fp8-block"], tmp_path / "out") / "weights"
    assert "invalid for input of size" in walk(str(folder))[0]["error"]


def test_the_serve_command_has_flags_that_lmdeploy_knows() -> None:
    from pipeline.targets.turbomind import Serve, command

    config = {"tp": 2, "enable_prefix_caching": True, "quant_policy": 8, "nnodes": 2, "dist_init_addr": "a:1"}
    words = command(Serve(), {**config, "max_batch_size": 4, "session_len": 64, "communicator": "nccl"})
    help_text = subprocess.run(
        [Path(PYTHON).parent / "lmdeploy", "serve", "api_server", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert [word for word in words if word.startswith("--") and word not in help_text] == []


def test_the_probe_refuses_a_fallback(source: Path, tmp_path: Path) -> None:
    """Without CUDA LMDeploy falls back to its PyTorch engine with a warning. The probe does not let that pass."""
    probe = tmp_path / "probe.py"
    probe.write_bytes((ROOT / "pipeline" / "data" / "llm_probe.py").read_bytes())
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    done = subprocess.run([PYTHON, probe, "engine"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "'pytorch' engine" in done.stderr
