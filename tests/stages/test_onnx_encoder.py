"""Stage onnx.encoder against transformers: the same numbers for each family and task, and refusals by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from pipeline.errors import EnginewrightError, StageError, UnavailableError
from pipeline.parity.pooling import read_pooling
from pipeline.stages.onnx.encoder import STAGE, EncoderOptions
from pipeline.stages.onnx.encoder_families import HEADS, families, read_encoder, why_not
from pipeline.stages.onnx.weights import STAGE as WEIGHTS
from pipeline.stages.onnx.weights import WeightOptions
from pipeline.stages.tasks import load_model
from pipeline.step import silent
from tests import models

TOLERANCE = 2e-5
OUTPUTS = {
    "feature-extraction": ["last_hidden_state"],
    "text-classification": ["logits"],
    "token-classification": ["logits"],
    "fill-mask": ["logits"],
    "question-answering": ["start_logits", "end_logits"],
}


def engine(folder: Path, task: Any, place: Path) -> tuple[ort.InferenceSession, dict[str, Any]]:
    """Exported, then made an engine of: the export alone refers to the model's own files."""
    for name in ("export", "engine"):
        (place / name).mkdir(parents=True)
    STAGE.run({"model": folder}, EncoderOptions(task=task), place / "export", silent)
    inputs = {"model": folder, "export": place / "export"}
    WEIGHTS.run(inputs, WeightOptions(precision="fp32"), place / "engine", silent)
    onnx.checker.check_model(place / "engine" / "model.onnx", full_check=True)
    graph = onnx.load(place / "engine" / "model.onnx", load_external_data=False)
    assert {node.domain for node in graph.graph.node} == {""}  # every runtime of ONNX reads it
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    export: dict[str, Any] = json.loads((place / "export" / "export.json").read_text())
    return ort.InferenceSession(place / "engine" / "model.onnx", options, providers=["CPUExecutionProvider"]), export


def text(batch: int, length: int, types: bool) -> dict[str, Any]:
    """Token ids, every row but the first padded on the right."""
    rng = np.random.default_rng(batch * 1000 + length)
    ids = rng.integers(5, models.VOCAB, (batch, length))
    mask = np.ones_like(ids)
    for row in range(1, batch):
        mask[row, max(1, length - row) :] = 0
    ids[mask == 0] = models.PAD
    found = {"input_ids": ids, "attention_mask": mask}
    return found | ({"token_type_ids": rng.integers(0, 2, (batch, length))} if types else {})


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_the_numbers_are_those_of_transformers(name: str, task: str, tmp_path: Path) -> None:
    folder = getattr(models, name)(tmp_path / "model", task=task)
    session, export = engine(folder, task, tmp_path)
    assert [port["name"] for port in export["interface"]["outputs"]] == OUTPUTS[task]
    assert ("token_type_ids" in {port.name for port in session.get_inputs()}) == (name == "bert")
    model = load_model(folder, task)
    for batch, length in ((1, 1), (3, 11), (2, 128)):
        inputs = text(batch, length, types=name == "bert")
        with torch.no_grad():
            wanted = model(**{key: torch.from_numpy(value) for key, value in inputs.items()})
        for output, found in zip(OUTPUTS[task], session.run(OUTPUTS[task], inputs), strict=True):
            right = getattr(wanted, output).numpy()
            assert found.shape == right.shape
            if found.shape[:2] == (batch, length):
                found, right = found[inputs["attention_mask"] == 1], right[inputs["attention_mask"] == 1]
            assert np.abs(found - right).max() < TOLERANCE


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_other_activations(activation: str, tmp_path: Path) -> None:
    folder = models.bert(tmp_path / "model", hidden_act=activation)
    session, _ = engine(folder, "feature-extraction", tmp_path)
    inputs = text(2, 9, types=True)
    with torch.no_grad():
        wanted = load_model(folder, "feature-extraction")(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    real = inputs["attention_mask"] == 1
    assert np.abs(session.run(None, inputs)[0][real] - wanted.last_hidden_state.numpy()[real]).max() < TOLERANCE


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_is_in_the_graph(pooling: str, normalize: bool, tmp_path: Path) -> None:
    folder = models.sentence_transformer(tmp_path / "model", pooling=pooling, normalize=normalize)
    session, export = engine(folder, "feature-extraction", tmp_path)
    assert export["pooling"] == pooling
    inputs = text(3, 12, types=True)
    tokens, vectors = session.run(["last_hidden_state", "sentence_embedding"], inputs)
    pool = read_pooling(folder)
    assert pool is not None
    for row, mask in enumerate(inputs["attention_mask"]):
        np.testing.assert_allclose(vectors[row], pool(tokens[row][mask == 1]), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_widened(dtype: str, tmp_path: Path) -> None:
    folder = models.bert(tmp_path / "model")
    load_model(folder, "feature-extraction").to(getattr(torch, dtype)).save_pretrained(folder)
    session, _ = engine(folder, "feature-extraction", tmp_path)
    inputs = text(1, 9, types=True)
    with torch.no_grad():
        wanted = load_model(folder, "feature-extraction").float()(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    assert np.abs(session.run(None, inputs)[0] - wanted.last_hidden_state.numpy()).max() < TOLERANCE


def config_of(name: str, tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((getattr(models, name)(tmp_path / name) / "config.json").read_text())
    return found


def test_every_family_is_read(tmp_path: Path) -> None:
    plain = {"bert": "bert", "roberta": "roberta", "distilbert": "distilbert"}
    for family in families():
        config = {**config_of(plain.get(family, "roberta"), tmp_path / family), "model_type": family}
        for task in HEADS:
            assert read_encoder(config, task).layers == 2


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "electra"},
        {"position_embedding_type": "relative_key"},
        {"hidden_act": "swish2"},
        {"a_new_field": 3},
        {"is_decoder": True},
        {"quantization_config": {"bits": 4}},
        {"hidden_size": "64"},
        {"num_hidden_layers": 0},
        {"num_attention_heads": 5},
    ],
)
def test_what_it_does_not_know_is_left_to_torch(change: dict[str, Any], tmp_path: Path) -> None:
    config = config_of("bert", tmp_path)
    assert why_not(config, "feature-extraction") is None
    error = why_not({**config, **change}, "feature-extraction")
    assert isinstance(error, UnavailableError)
    field, value = next(iter(change.items()))
    assert any(word in str(error) for word in (field, str(value)))


def test_a_task_that_it_does_not_know(tmp_path: Path) -> None:
    assert "image-classification" in str(why_not(config_of("bert", tmp_path), "image-classification"))


def rewritten(folder: Path, change: Any) -> Path:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda t: t.pop("encoder.layer.1.output.dense.bias"), StageError, "no tensor 'encoder.layer.1.output.dense.b"),
        (
            lambda t: t.update({"encoder.layer.1.adapter.weight": np.zeros((2, 2), np.float32)}),
            UnavailableError,
            "no place for the tensor 'encoder.layer.1.adapter.weight'",
        ),
        (
            lambda t: t.update({"encoder.layer.2.output.dense.bias": np.zeros(64, np.float32)}),
            UnavailableError,
            "does config.json count all its layers",
        ),
        (
            lambda t: t.update({"encoder.layer.0.attention.self.key.weight": np.zeros((32, 64), np.float32)}),
            StageError,
            "not of the same model",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit(change: Any, kind: type[EnginewrightError], words: str, tmp_path: Path) -> None:
    folder = rewritten(models.bert(tmp_path / "model"), change)
    (tmp_path / "out").mkdir()
    with pytest.raises(kind) as caught:
        STAGE.run({"model": folder}, EncoderOptions(task="feature-extraction"), tmp_path / "out", silent)
    assert words in str(caught.value)


def test_heads_of_other_tasks_are_left_out(tmp_path: Path) -> None:
    """The token vectors of a checkpoint that was trained for masked words."""
    folder = models.bert(tmp_path / "model", task="fill-mask")
    session, _ = engine(folder, "feature-extraction", tmp_path)
    inputs = text(2, 7, types=True)
    with torch.no_grad():
        wanted = load_model(folder, "feature-extraction")(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    real = inputs["attention_mask"] == 1
    assert np.abs(session.run(None, inputs)[0][real] - wanted.last_hidden_state.numpy()[real]).max() < TOLERANCE
