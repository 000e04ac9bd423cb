"""Optimum's exporter in its own toolchain: graphs held against transformers, refusals, and a build."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

from pipeline.engine import Sampling
from pipeline.stages.onnx import weights as onnx_weights
from pipeline.step import silent
from pipeline.targets.ort_engine import open_engine
from tests import models
from tests.conftest import ROOT
from tests.e2e.harness import Site, command, refused

PYTHON = os.environ.get("ENGINEWRIGHT_TOOLCHAIN_OPTIMUM", "")
optimum = [
    pytest.mark.optin,
    pytest.mark.skipif(not PYTHON, reason="another environment: set ENGINEWRIGHT_TOOLCHAIN_OPTIMUM to its interpreter"),
]

# One process for all: importing torch costs more than an export. The second export shows that bytes repeat.
EXPORT_ALL = """
import json, sys
from pathlib import Path
from pipeline.errors import EnginewrightError
from pipeline.stages.onnx.optimum import OptimumOptions, run
from pipeline.step import silent

source, found = Path(sys.argv[1]), {}
for model in sorted(source.iterdir()):
    for attempt in ("first", "second") if model.name in ("gpt2", "sentences") else ("first",):
        out = Path(sys.argv[2]) / attempt / model.name
        out.mkdir(parents=True)
        try:
            run({"model": model}, OptimumOptions(), out, silent)
        except EnginewrightError as error:
            found[model.name] = [error.exit_code, str(error)]
            assert not list(out.iterdir())

import optimum.exporters.onnx

def broken(*given, **named):
    raise ValueError("first line\\nShapes do not match: logits [2, 16]")

optimum.exporters.onnx.onnx_export_from_model = broken
out = Path(sys.argv[2]) / "broken"
out.mkdir()
try:
    run({"model": source / "gpt2"}, OptimumOptions(), out, silent)
except EnginewrightError as error:
    found["broken"] = [error.exit_code, str(error)]
print(json.dumps(found))
"""


def rotary(path: Path) -> Path:
    """GPT-NeoX with rotary settings that are no defaults: transformers 5 writes them in rope_parameters."""
    config = transformers.GPTNeoXConfig(
        vocab_size=models.VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.2, bos_token_id=models.BOS, eos_token_id=models.EOS,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    torch.manual_seed(0)
    models.write_tokenizer(path, padding_side="left")
    transformers.GPTNeoXForCausalLM(config).save_pretrained(path)
    return path


def by_layer(path: Path) -> Path:
    """Gemma 3: rotary settings that differ between layers."""
    config = transformers.Gemma3TextConfig(
        vocab_size=models.VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=32,
    )  # fmt: skip
    models.write_tokenizer(path)
    transformers.Gemma3ForCausalLM(config).save_pretrained(path)
    return path


def unknown(path: Path) -> Path:
    """Mamba: no keys and values."""
    config = transformers.MambaConfig(vocab_size=models.VOCAB, hidden_size=64, num_hidden_layers=2, state_size=8)
    models.write_tokenizer(path)
    transformers.MambaForCausalLM(config).save_pretrained(path)
    return path


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
DECODERS = ("gpt2", "llama3", "neox")


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("optimum-models")
    models.gpt2(place / "gpt2")
    models.llama(place / "llama3", rope_parameters=LLAMA3)
    models.bert(place / "classifier", "text-classification")
    models.sentence_transformer(place / "sentences")
    models.t5(place / "t5")
    rotary(place / "neox")
    by_layer(place / "gemma3")
    unknown(place / "mamba")
    return place


@pytest.fixture(scope="session")
def exports(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the exports, and what was refused: model -> (exit code, message)."""
    place = tmp_path_factory.mktemp("optimum-exports")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [PYTHON, "-c", EXPORT_ALL, str(sources), str(place)],
        env={**clean, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return place, json.loads(done.stdout.splitlines()[-1])


def engine_of(name: str, sources: Path, exports: tuple[Path, dict[str, Any]], out: Path) -> Any:
    inputs = {"export": exports[0] / "first" / name, "model": sources / name}
    onnx.checker.check_model(str(inputs["export"] / "model.onnx"), full_check=True)
    onnx_weights.run(inputs, onnx_weights.WeightOptions(), out, silent)
    return open_engine(out)


class TestExports:
    pytestmark = optimum

    @pytest.mark.parametrize("name", DECODERS)
    def test_a_decoder_equals_transformers(
        self, name: str, sources: Path, exports: tuple[Path, dict[str, Any]], tmp_path: Path
    ) -> None:
        """Logits of a batch padded on the left, and greedy tokens through the cache."""
        engine = engine_of(name, sources, exports, tmp_path)
        model = transformers.AutoModelForCausalLM.from_pretrained(sources / name)
        ids = np.random.default_rng(0).integers(5, models.VOCAB, (3, 40))
        mask = np.ones_like(ids)
        mask[0, :9] = mask[2, :31] = 0
        places = torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0))
        with torch.no_grad():
            expected = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), position_ids=places).logits
        found = engine.run({"input_ids": ids, "attention_mask": mask})["logits"]
        assert np.abs(found - expected.numpy())[mask == 1].max() < 5e-5
        prompts = [[int(token) for token in ids[row, -length:]] for row, length in ((0, 30), (1, 40), (2, 5))]
        written: list[list[int]] = [[], [], []]
        for token in engine.generate(prompts, Sampling(max_new_tokens=24)):
            written[token.prompt].append(token.token_id)
        for prompt, tokens in zip(prompts, written, strict=True):
            given = torch.tensor([prompt])
            made = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=24, do_sample=False)
            assert tokens == made[0, len(prompt) :].tolist()

    def test_a_classifier_equals_transformers(
        self, sources: Path, exports: tuple[Path, dict[str, Any]], tmp_path: Path
    ) -> None:
        engine = engine_of("classifier", sources, exports, tmp_path)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(sources / "classifier")
        ids = np.random.default_rng(1).integers(5, 250, (2, 13))
        mask, types = np.ones_like(ids), np.zeros_like(ids)
        mask[0, 6:], types[:, 5:] = 0, 1
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        with torch.no_grad():
            expected = model(**{key: torch.from_numpy(value) for key, value in feeds.items()}).logits.numpy()
        assert np.abs(engine.run(feeds)["logits"] - expected).max() < 1e-5

    def test_sentence_embeddings_are_pooled_in_the_graph(
        self, sources: Path, exports: tuple[Path, dict[str, Any]], tmp_path: Path
    ) -> None:
        """Mean over the tokens that are not padding, then length one: computed anew here, in numpy."""
        engine = engine_of("sentences", sources, exports, tmp_path)
        model = transformers.AutoModel.from_pretrained(sources / "sentences")
        ids = np.random.default_rng(2).integers(5, 250, (2, 11))
        mask = np.ones_like(ids)
        mask[1, 4:] = 0
        found = engine.run({"input_ids": ids, "attention_mask": mask})
        with torch.no_grad():
            tokens = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state.numpy()
        assert np.abs(found["last_hidden_state"] - tokens)[mask == 1].max() < 1e-5
        for row, length in enumerate(mask.sum(1)):
            mean = tokens[row, :length].mean(0)
            assert np.abs(found["sentence_embedding"][row] - mean / np.linalg.norm(mean)).max() < 1e-6
        told = json.loads((tmp_path / "engine.json").read_text())
        assert told["pooling"] == "mean"
        assert [port["name"] for port in told["interface"]["outputs"]] == ["last_hidden_state", "sentence_embedding"]

    def test_refusals_name_the_reason(self, exports: tuple[Path, dict[str, Any]]) -> None:
        words = {"t5": "'text2text-generation'", "mamba": "Optimum does not know it", "gemma3": "rope_parameters"}
        refusals = {name: told for name, told in exports[1].items() if name != "broken"}
        assert refusals.keys() == words.keys()
        for name, word in words.items():
            code, message = refusals[name]
            assert code == 5
            assert word in message
            assert "torch" in message, "what to do instead"

    def test_a_failed_export_keeps_the_words_of_optimum(self, exports: tuple[Path, dict[str, Any]]) -> None:
        code, message = exports[1]["broken"]
        assert code == 3
        assert "cannot export model_type 'gpt2'" in message
        assert "Shapes do not match: logits [2, 16]" in message

    @pytest.mark.parametrize("name", ["gpt2", "sentences"])
    def test_a_second_export_writes_the_same_bytes(self, exports: tuple[Path, dict[str, Any]], name: str) -> None:
        first, second = ((exports[0] / attempt / name) for attempt in ("first", "second"))
        assert sorted(path.name for path in first.iterdir()) == ["export.json", "model.onnx"]
        for path in first.iterdir():
            assert path.read_bytes() == (second / path.name).read_bytes()

    def test_no_path_of_this_machine_is_in_the_graph(self, exports: tuple[Path, dict[str, Any]], sources: Path) -> None:
        for path in (exports[0] / "first").glob("*/*"):
            data = path.read_bytes()
            assert b"site-packages" not in data
            assert str(sources).encode() not in data
            assert str(exports[0]).encode() not in data

    def test_a_build_passes_its_gates(self, tmp_path: Path) -> None:
        """`exporter: optimum` in a recipe, in the shipped model: every gate of fp32 passes."""
        site = Site.write(tmp_path)
        chosen = ("--set", "targets.cpu-fp32.exporter=optimum", "--target", "cpu-fp32")
        site.made(*chosen, env={"ENGINEWRIGHT_TOOLCHAIN_OPTIMUM": PYTHON})
        manifest = json.loads((site.out / "small" / "cpu-fp32" / "manifest.json").read_text())
        (stage,) = (stage for stage in manifest["stages"] if stage["id"] == "export")
        assert (stage["stage"], stage["toolchain"]) == ("onnx.optimum", "optimum")
        assert stage["tools"]["transformers"].startswith("4.57")


def test_without_its_toolchain_a_build_says_how_to_get_it(tmp_path: Path) -> None:
    site = Site.write(tmp_path)
    chosen = ("--set", "targets.cpu-fp32.exporter=optimum", "--target", "cpu-fp32")
    done = site.build("--plan", *chosen, env={"ENGINEWRIGHT_CACHE": str(tmp_path / "nothing")})
    refused(done, 5, "the toolchain 'optimum' is not installed", "enginewright toolchain install optimum")


def test_encoder_decoders_are_refused_before_anything_runs(tmp_path: Path) -> None:
    models.t5(tmp_path / "t5")
    recipe = "name: t5\nmodel: {source: t5}\ntargets:\n  cpu: {runtime: onnxruntime, exporter: optimum}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    done = command("build", "recipe.yaml", "--plan", "--cache", tmp_path / "cache", cwd=tmp_path)
    refused(done, 64, "optimum builds no encoder-decoders", "say `torch`")
