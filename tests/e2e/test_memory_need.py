"""What stages say of their memory, against what their processes held."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline import hardware
from pipeline.cli import build as build_command
from pipeline.errors import UnavailableError
from pipeline.size import Size, holding, placing, placing_blocks, size_of
from tests.conftest import ROOT
from tests.e2e.harness import DATA, Done, Site, command
from tests.models import llama

SLACK = 64_000_000
"""A need is at most 2.5 times what was held, or so many bytes above it: a small process is no scheduler's concern."""


def compared(recipe: Path, site: Site) -> dict[str, tuple[int, int]]:
    """Step -> (need, peak) of every step that ran, bytes."""
    argv = site.argv("--plan", "--format", "json")[2:]
    done = command("build", str(recipe), *argv, cwd=site.root)
    assert done.code == 0, done.err
    needs = {row["step"]: row["memory_need_bytes"] for row in done.json["steps"]}
    keys = {row["step"]: row["key"] for row in done.json["steps"]}
    found = {}
    for step, need in needs.items():
        run: dict[str, Any] = json.loads((site.cache / "results" / keys[step] / "entry.json").read_text())["run"]
        found[step] = (need, run["peak_rss_bytes"])
    return found


def judged(found: dict[str, tuple[int, int]]) -> None:
    """Enough within a tenth, which libraries and the allocator decide, and not far too much."""
    short = {step: pair for step, pair in found.items() if 1.1 * pair[0] < pair[1]}
    assert not short, "a step held more than it said"
    wide = {step: pair for step, pair in found.items() if pair[0] > max(2.5 * pair[1], pair[1] + SLACK)}
    assert not wide, "a step said far more than it held"


def test_needs_of_a_decoder(shipped: tuple[Done, Site]) -> None:
    found = compared(ROOT / "recipes" / "tiny-llama.yaml", shipped[1])
    assert len(found) > 10
    judged(found)


def test_needs_of_an_encoder(sentences: tuple[Done, Site]) -> None:
    judged(compared(ROOT / "recipes" / "minilm.yaml", sentences[1]))


MIDDLE = f"""\
name: middle
model: {{source: model, license: MIT}}
calibration: {{path: {DATA / "pydoc-calibration.txt"}, samples: 8, length: 64}}
parity:
  prompt_count: 2
  new_tokens: 4
  data: {{path: {DATA / "pydoc-heldout.txt"}, samples: 4, length: 64}}
targets:
  torch: {{runtime: onnxruntime, exporter: torch}}
  ort: {{runtime: onnxruntime, precision: int4, quantize: {{group_size: 32}}}}
  ov: {{runtime: openvino, precision: int4}}
  gguf: {{runtime: gguf, precision: Q4_K_M}}
  hf: {{runtime: transformers, precision: int4}}
  rtx: {{runtime: tensorrt-rtx, precision: fp16, devices: [rtx-4090], sequence: [1, 32, 64]}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [512, 1024])
def test_needs_grow_as_the_model_does(tmp_path: Path, hidden: int) -> None:
    """57 and 207 million parameters, six runtimes. The gates of random weights are no matter."""
    (tmp_path / "recipe.yaml").write_text(MIDDLE)
    shape = {"hidden_size": hidden, "num_hidden_layers": hidden // 128 + 4, "intermediate_size": hidden * 11 // 4}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128}
    llama(tmp_path / "model", dtype="bfloat16", vocab_size=32000, **shape, **heads)
    site = Site(tmp_path, tmp_path / "cache", tmp_path / "out")
    assert site.build().code in (0, 4)
    judged(compared(tmp_path / "recipe.yaml", site))


def test_what_cannot_fit_is_refused_with_the_plan(ready: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(hardware.probe(), memory_bytes=100_000_000)
    monkeypatch.setattr(build_command, "probe", lambda: small)
    site = replace(ready, cache=tmp_path / "cache")
    argv = [str(site.root / "recipe.yaml"), *site.argv("--plan")[2:]]
    result = CliRunner().invoke(build_command.build, argv)
    assert isinstance(result.exception, UnavailableError)
    assert result.exception.exit_code == 5
    assert "this host has 100.0 MB of memory, and the step reference needs about" in result.exception.message
    assert "--memory 1GB" in result.exception.hint
    assert "of 100.0 MB here" in result.output
    assert CliRunner().invoke(build_command.build, [*argv, "--memory", "1GB"]).exception is None
    # What is in the store needs no memory.
    full = [str(ready.root / "recipe.yaml"), *ready.argv("--plan")[2:]]
    assert CliRunner().invoke(build_command.build, full).exception is None


def test_the_size_of_a_checkpoint() -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 1000, "intermediate_size": 128}
    size = size_of(1_000_000, {**config, "torch_dtype": "bfloat16"})
    assert size == Size(weights=2_000_000, largest=256_000, layer=872_000, vocab=4000, hidden=256)
    assert size_of(1_000_000, {"text_config": {**config, "dtype": "float32"}}).weights == 1_000_000
    assert size_of(1_000_000, {}) == Size(weights=1_000_000, largest=1_000_000, layer=1_000_000)


def test_formulas() -> None:
    size = Size(weights=10**9, largest=10**8, layer=10**7, vocab=1000)

    class Options:
        length, share, precision = 10, 0.5, "int4"

    need = holding(1, weights=2, largest=1, layer=1, logits=3)
    assert need(Options, size) == 10**6 + 10**9 + 10**8 + 10**7 + 30_000
    assert placing(Options, size) == 170_000_000  # streamed
    assert placing(Options, replace(size, weights=10**8)) == 178_400_000  # in memory
    assert placing_blocks(Options, size) == 80_000_000
    assert placing_blocks(Options, replace(size, weights=10**8)) == 178_400_000
