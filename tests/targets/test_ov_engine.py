"""The engine over OpenVINO, judged by transformers and OpenVINO GenAI; and what becomes of a blob that does not fit."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
ov = pytest.importorskip("openvino")

from pipeline import hardware  # noqa: E402
from pipeline.engine import Sampling, completions  # noqa: E402
from pipeline.errors import RecipeError, StageError, UnavailableError  # noqa: E402
from pipeline.stages.onnx import torch as onnx_torch  # noqa: E402
from pipeline.stages.openvino import compile as openvino_compile  # noqa: E402
from pipeline.stages.openvino import convert as openvino_convert  # noqa: E402
from pipeline.stages.openvino import tokenizer as openvino_tokenizer  # noqa: E402
from pipeline.stages.openvino import weights as openvino_weights  # noqa: E402
from pipeline.step import silent  # noqa: E402
from pipeline.targets.ov_engine import open_engine  # noqa: E402
from tests import models  # noqa: E402
from tests.conftest import ROOT  # noqa: E402
from tests.stages.decoders import CASES, SIZES, reference, write_decoder  # noqa: E402

PROMPTS = [[5, 9, 11], [7, 8, 60, 61, 62, 63, 64], [44], [33, 20, 20, 33, 20]]
MODES: list[dict[str, Any]] = [{}, {"beams": 4}, {"repetition_penalty": 1.3}, {"beams": 3, "length_penalty": 2.0}]
SHIPPED = ROOT / "recipes" / "models" / "pydoc-llama"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models: torch's threads would mostly wait for each other, for minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(root: Path, stage: Any, options: Any, inputs: dict[str, Path], name: str) -> Path:
    (root / name).mkdir()
    stage(inputs, options, root / name, silent)
    return root / name


def compiled(root: Path, ir: Path, name: str = "engine") -> Path:
    return made(root, openvino_compile.run, openvino_compile.CompileOptions(), {"ir": ir}, name)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the model in torch, its engine's folder with a blob)."""
    root = tmp_path_factory.mktemp("llama")
    folder = models.llama(root / "model", seed=1)
    ir = made(root, openvino_weights.run, openvino_weights.DecoderOptions(), {"model": folder}, "ir")
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), compiled(root, ir)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family that our builder does not know: exported by torch, its caches turned into state."""
    root = tmp_path_factory.mktemp("gpt2")
    folder = models.gpt2(root / "model")
    exported = made(root, onnx_torch.run, onnx_torch.TorchExportOptions(), {"model": folder}, "export")
    inputs = {"model": folder, "export": exported}
    ir = made(root, openvino_convert.run, openvino_convert.ConvertOptions(), inputs, "ir")
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), compiled(root, ir)


def theirs(model: Any, prompt: Sequence[int], new: int, **options: Any) -> list[int]:
    ids = torch.tensor([list(prompt)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options)
    tokens = [int(token) for token in out[0, len(prompt) :]]
    return tokens[: tokens.index(models.EOS) + 1] if models.EOS in tokens else tokens


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_generates_what_transformers_generates(name: str, mode: dict[str, Any], request: Any) -> None:
    model, folder = request.getfixturevalue(name)
    renamed = {"num_beams" if key == "beams" else key: value for key, value in mode.items()}
    expected = [theirs(model, prompt, 12, **renamed) for prompt in PROMPTS]
    engine = open_engine(folder)
    assert completions(engine, PROMPTS, Sampling(max_new_tokens=12, **mode)) == expected
    assert engine.source == "blob"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_may_stand_on_either_side(name: str, request: Any) -> None:
    model, folder = request.getfixturevalue(name)
    longest = max(map(len, PROMPTS))
    engine = open_engine(folder)
    alone = [engine.run({"input_ids": np.array([prompt])})["logits"][0] for prompt in PROMPTS]
    with torch.no_grad():
        expected = [model(torch.tensor([prompt])).logits[0].numpy() for prompt in PROMPTS]
    for found, wanted in zip(alone, expected, strict=True):
        assert np.abs(found - wanted).max() < 1e-4
    for left in (True, False):
        ids = np.full((len(PROMPTS), longest), models.PAD)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(PROMPTS):
            place = slice(longest - len(prompt), longest) if left else slice(0, len(prompt))
            ids[row, place], mask[row, place] = prompt, 1
        logits = engine.run({"input_ids": ids, "attention_mask": mask})["logits"]
        for row, wanted in enumerate(expected):
            assert np.abs(logits[row][mask[row] == 1] - wanted).max() < 1e-4


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped Llama in fp32 with its converted tokenizer: what GenAI reads."""
    root = tmp_path_factory.mktemp("shipped")
    told = openvino_tokenizer.TokenizerOptions()
    tokenizer = made(root, openvino_tokenizer.run, told, {"model": SHIPPED}, "tokenizer")
    inputs = {"model": SHIPPED, "tokenizer": tokenizer}
    return made(root, openvino_weights.run, openvino_weights.DecoderOptions(), inputs, "engine")


@pytest.mark.parametrize("backend", ["PA", "SDPA"])
def test_genai_generates_the_references_tokens(shipped: Path, backend: str) -> None:
    """8 prompts x 32 tokens and a prompt of one token, alone; three with padding on the left, together; as text."""
    genai = pytest.importorskip("openvino_genai")
    model = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED, padding_side="left")
    lines = (ROOT / "recipes" / "data" / "prompts.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines][:8]
    assert len(texts) == 8
    pipeline = genai.LLMPipeline(str(shipped), "CPU", ATTENTION_BACKEND=backend, INFERENCE_PRECISION_HINT="f32")
    config = genai.GenerationConfig(max_new_tokens=32, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    prompts = [tokenizer(text)["input_ids"] for text in texts] + [[tokenizer(texts[0])["input_ids"][-1]]]
    wanted = []
    for ids in prompts:
        out = model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0, len(ids) :].tolist()
        wanted.append(out)
        assert pipeline.generate(ov.Tensor(np.array([ids])), config).tokens[0] == out
    batch = tokenizer(texts[:3], return_tensors="np", padding=True)
    assert (batch["attention_mask"] == 0).any()
    given = genai.TokenizedInputs(ov.Tensor(batch["input_ids"]), ov.Tensor(batch["attention_mask"]))
    for found, out in zip(pipeline.generate(given, config).tokens, wanted, strict=False):
        assert found == out[: len(found)] and len(found) == len(out)
    config.apply_chat_template = False
    said = pipeline.generate(texts[0], config)
    assert str(said).strip() == tokenizer.decode(wanted[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize("case", ["mistral-window", "gemma3_text", "gemma2"])
def test_genai_sees_windows_and_soft_caps(shipped: Path, case: str, tmp_path: Path) -> None:
    """Paged attention takes windows from the shape of the mask. Soft caps it does not know: GenAI does without it."""
    genai = pytest.importorskip("openvino_genai")
    kind, over = CASES[case]
    layers = 7 if case == "gemma3_text" else 2
    model = write_decoder(tmp_path / "model", kind, **({"num_hidden_layers": layers} | over))
    folder = made(tmp_path, openvino_weights.run, openvino_weights.DecoderOptions(), {"model": model}, "engine")
    for name in ("openvino_tokenizer", "openvino_detokenizer"):
        for suffix in (".xml", ".bin"):
            shutil.copyfile(shipped / f"{name}{suffix}", folder / f"{name}{suffix}")
    ids = np.random.default_rng(5).integers(5, SIZES["vocab_size"], (1, 24))
    config = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = reference(model).generate(torch.tensor(ids), **config)[0, 24:].tolist()
    pipeline = genai.LLMPipeline(str(folder), "CPU", INFERENCE_PRECISION_HINT="f32")
    found = pipeline.generate(ov.Tensor(ids), genai.GenerationConfig(ignore_eos=True, **config)).tokens[0]
    assert found == expected


def refit(folder: Path, place: Path, **changes: Any) -> Path:
    """A copy of an engine whose blob says that it was compiled elsewhere."""
    shutil.copytree(folder, place)
    told = json.loads((place / "engine.json").read_text("utf-8"))
    told["compiled"] |= changes
    (place / "engine.json").write_text(json.dumps(told), "utf-8")
    return place


ELSEWHERE = {
    "another OpenVINO": ({"openvino": "2026.4.0-1-abc"}, "compiled by OpenVINO 2026.4.0-1-abc, this is"),
    "another CPU": ({"isa": [*hardware.probe().isa, "not_here"]}, "compiled for another CPU (they differ in not_here)"),
    "another machine": ({"arch": "aarch64"}, "compiled for linux on aarch64"),
    "other settings": ({"properties": {"INFERENCE_PRECISION_HINT": "bf16"}}, "other settings are asked for"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_a_blob_from_elsewhere_gives_way_to_the_ir(
    llama: Any, case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, folder = llama
    changes, words = ELSEWHERE[case]
    engine = open_engine(refit(folder, tmp_path / "engine", **changes))
    with caplog.at_level(logging.WARNING):
        found = completions(engine, PROMPTS[:1], Sampling(max_new_tokens=6))
    assert found == [theirs(model, PROMPTS[0], 6)]
    assert engine.source == "ir"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("openvino_model.blob is not used: it was" if "compiled" in words else "openvino_model.blob")
    assert words in line and line.endswith("openvino_model.xml is compiled instead")


def test_a_broken_blob_gives_way_too(llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, folder = llama
    place = refit(folder, tmp_path / "engine")
    blob = place / "openvino_model.blob"
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:2000])
    engine = open_engine(place)
    assert completions(engine, PROMPTS[:1], Sampling(max_new_tokens=6)) == [theirs(model, PROMPTS[0], 6)]
    assert engine.source == "ir" and "OpenVINO does not load it" in caplog.text


COMPILE = """\
import sys
from pathlib import Path
from pipeline.stages.openvino.compile import CompileOptions, run
from pipeline.step import silent
run({"ir": Path(sys.argv[1])}, CompileOptions(), Path(sys.argv[2]), silent)
"""


def test_the_blob_is_the_same_from_run_to_run_and_small(llama: Any, tmp_path: Path) -> None:
    """Each in a process of its own, as steps are: OpenVINO numbers nodes by what the process did before."""
    _, folder = llama
    ir = refit(folder, tmp_path / "ir")
    (ir / "openvino_model.blob").unlink()
    made = [tmp_path / "a", tmp_path / "b"]
    for place in made:
        place.mkdir()
        subprocess.run([sys.executable, "-c", COMPILE, str(ir), str(place)], check=True, cwd=ROOT)
    for name in ("openvino_model.blob", "engine.json"):
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes()
    told = json.loads((made[0] / "engine.json").read_text("utf-8"))["compiled"]
    host = hardware.probe()
    assert (told["openvino"], told["isa"], told["weights"]) == (ov.__version__, list(host.isa), "bin")
    assert (made[0] / "openvino_model.blob").stat().st_size < (ir / "openvino_model.bin").stat().st_size / 2


def test_a_graph_whose_blob_needs_its_weights_gets_them(gpt2: Any) -> None:
    """OpenVINO 2026.4 exports some graphs so that they do not load without: compile compares, and sees it."""
    _, folder = gpt2
    told = json.loads((folder / "engine.json").read_text("utf-8"))["compiled"]
    assert told["weights"] == "inside"


def test_what_is_wrong_is_told(llama: Any, tmp_path: Path) -> None:
    _, folder = llama
    engine = open_engine(folder)
    with pytest.raises(RecipeError, match="the vocabulary ends at 319"):
        completions(engine, [[320]], Sampling())
    with pytest.raises(RecipeError, match="a decoder takes input_ids and attention_mask, not pixel_values"):
        engine.run({"pixel_values": np.zeros((1, 3))})
    with pytest.raises(RecipeError, match="did you mean 'threads'"):
        open_engine(folder, {"treads": 1})
    with pytest.raises(StageError, match=r"engine\.json is missing"):
        open_engine(tmp_path)
    place = refit(folder, tmp_path / "cut", openvino="0")
    (place / "openvino_model.bin").unlink()
    with pytest.raises(StageError, match=r"openvino_model\.bin is missing"):
        completions(open_engine(place), [[5]], Sampling(max_new_tokens=1))
    with pytest.raises(UnavailableError, match="OpenVINO sees no GPU here"):
        completions(open_engine(folder, {"device": "GPU"}), [[5]], Sampling(max_new_tokens=1))
