"""What a checkpoint does, and what is refused when it is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import EnginewrightError, RecipeError, StageError
from pipeline.recipe import TASKS
from pipeline.stages.tasks import AUTO_CLASSES, check_tokenizer, infer_task, kind_of, load_model
from tests import models
from tests.conftest import ROOT


def folder_with(tmp_path: Path, **config: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("architecture", "model_type", "task"),
    [
        ("LlamaForCausalLM", "llama", "text-generation"),
        ("GPT2LMHeadModel", "gpt2", "text-generation"),
        ("T5ForConditionalGeneration", "t5", "text2text-generation"),
        ("MarianMTModel", "marian", "text2text-generation"),
        ("WhisperForConditionalGeneration", "whisper", "automatic-speech-recognition"),
        ("BertModel", "bert", "feature-extraction"),
        ("RobertaForMaskedLM", "roberta", "fill-mask"),
        ("DistilBertForSequenceClassification", "distilbert", "text-classification"),
        ("BertForTokenClassification", "bert", "token-classification"),
        ("BertForQuestionAnswering", "bert", "question-answering"),
        ("ViTForImageClassification", "vit", "image-classification"),
    ],
)
def test_the_architecture_says_the_task(tmp_path: Path, architecture: str, model_type: str, task: str) -> None:
    assert infer_task(folder_with(tmp_path, architectures=[architecture], model_type=model_type)) == task


def test_sentence_transformers_folders_are_for_embeddings(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, architectures=["BertForMaskedLM"], model_type="bert")
    (folder / "modules.json").write_text("[]")
    assert infer_task(folder) == "feature-extraction"


@pytest.mark.parametrize("config", [{}, {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}])
def test_an_unknown_task_is_refused_with_the_choices(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        infer_task(folder_with(tmp_path, **config))
    assert str(config.get("architectures", [])) in caught.value.message
    assert all(task in caught.value.hint for task in TASKS)


def test_every_task_has_a_kind_and_a_class() -> None:
    assert {task: kind_of(task) for task in TASKS} == {
        **dict.fromkeys(TASKS, "encoder"),
        "text-generation": "decoder",
        "text2text-generation": "seq2seq",
        "automatic-speech-recognition": "seq2seq",
    }
    assert set(AUTO_CLASSES) == set(TASKS)
    with pytest.raises(RecipeError, match="text-to-image"):
        kind_of("text-to-image")


def test_inferring_imports_nothing_heavy() -> None:
    code = (
        "import sys, pathlib; from pipeline.stages.tasks import infer_task, check_tokenizer;"
        "folder = pathlib.Path('recipes/models/pydoc-llama');"
        "assert infer_task(folder) == 'text-generation'; check_tokenizer(folder, 'text-generation');"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_a_loaded_model_is_fp32_and_in_eval_mode(tmp_path: Path) -> None:
    model = load_model(models.llama(tmp_path, dtype="bfloat16"), "text-generation")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_loading_leaves_other_packages_importable(tmp_path: Path) -> None:
    """Optional packages are hidden from transformers only while it is imported."""
    load_model(models.bert(tmp_path), "feature-extraction")
    assert all(module is not None for module in sys.modules.values())


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def vocabulary_of_another_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))


def other_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 500}))


def unknown_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nosuch"}))


def own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto}))
    (folder / "configuration_own.py").write_text("raise SystemExit('this must not run')")


def pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def not_a_number(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (no_tokenizer, RecipeError, ["tokenizer.json"]),
        (vocabulary_of_another_model, RecipeError, ["token id", "vocab_size", "100"]),
        (other_shapes, RecipeError, ["embeddings.word_embeddings.weight", "[320, 64]", "[500, 64]"]),
        (unknown_type, RecipeError, ["nosuch"]),
        (own_code, RecipeError, ["own", "trust_remote_code"]),
        (pickle_only, RecipeError, ["pytorch_model.bin", "pickle"]),
        (truncated, StageError, ["model.safetensors", "truncated"]),
        (not_a_number, StageError, ["encoder.layer.1.output.dense.bias", "NaN"]),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    tmp_path: Path, damage: Callable[[Path], None], kind: type[EnginewrightError], words: list[str]
) -> None:
    folder = models.bert(tmp_path)
    damage(folder)
    with pytest.raises(kind) as caught:
        load_model(folder, "feature-extraction")
    assert caught.value.hint
    for word in words:
        assert word in str(caught.value)


def test_a_head_that_was_not_trained_is_refused(tmp_path: Path) -> None:
    """Transformers would draw the missing weights at random and go on."""
    folder = models.bert(tmp_path, "fill-mask")
    with pytest.raises(RecipeError, match=r"classifier.*BertForSequenceClassification"):
        load_model(folder, "text-classification")


def test_images_need_no_tokenizer(tmp_path: Path) -> None:
    check_tokenizer(folder_with(tmp_path, model_type="vit"), "image-classification")
