"""Stage onnx.torch against transformers: the same numbers, at sizes and paddings that it was not traced with."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from transformers import GenerationMixin

from pipeline.errors import RecipeError, StageError
from pipeline.stages.onnx import torch_save as onnx_torch_save
from pipeline.stages.onnx.torch import STAGE, TorchExportOptions
from pipeline.stages.tasks import load_model
from pipeline.step import silent
from tests import models
from tests.conftest import ROOT

TOLERANCE = 1e-4
Exported = tuple[Any, Path, dict[str, Any]]


def export(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    out.mkdir()
    STAGE.run({"model": folder}, TorchExportOptions(**options), out, silent)
    document: dict[str, Any] = json.loads((out / "export.json").read_text())
    for component in document["components"].values():
        onnx.checker.check_model(out / component, full_check=True)
    return document


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """(transformers model, export folder, export.json) of one of tests.models, made once for each set of arguments."""
    done: dict[str, Exported] = {}

    def get(name: str, **arguments: Any) -> Exported:
        key = f"{name}{sorted(arguments.items())}"
        if key not in done:
            root = tmp_path_factory.mktemp(name)
            folder = getattr(models, name)(root / "model", **arguments)
            document = export(folder, root / "export")
            done[key] = load_model(folder, document["task"]), root / "export", document
        return done[key]

    return get


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def text(batch: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random token ids; every row but the first is padded on the right."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, models.VOCAB, (batch, length))
    mask = np.ones_like(ids)
    for row in range(1, batch):
        mask[row, length - row :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def agree(model: Any, graph: ort.InferenceSession, inputs: dict[str, np.ndarray], names: list[str]) -> None:
    """Compare at the positions that are not padding."""
    with torch.no_grad():
        wanted = model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    for name, found in zip(names, graph.run(names, inputs), strict=True):
        right = getattr(wanted, name).numpy()
        assert found.shape == right.shape
        if "attention_mask" in inputs and found.shape[:2] == inputs["attention_mask"].shape:
            keep = inputs["attention_mask"].astype(bool)
            found, right = found[keep], right[keep]
        assert np.abs(found - right).max() < TOLERANCE


@pytest.mark.parametrize(
    ("name", "arguments", "names"),
    [
        pytest.param("bert", {"task": "fill-mask"}, ["logits"], marks=pytest.mark.slow),
        ("bert", {"task": "question-answering"}, ["start_logits", "end_logits"]),
        pytest.param("bert", {"task": "token-classification"}, ["logits"], marks=pytest.mark.slow),
        ("roberta", {"task": "text-classification"}, ["logits"]),
    ],
)
def test_encoders_agree_with_transformers(
    exported: Callable[..., Exported], name: str, arguments: dict[str, Any], names: list[str]
) -> None:
    model, out, document = exported(name, **arguments)
    assert document["task"] == arguments["task"]
    assert document["kind"] == "encoder"
    assert [port["name"] for port in document["interface"]["outputs"]] == names
    graph = session(out / "model.onnx")
    for batch, length in ((1, 2), (3, 17), (4, 64)):
        inputs = text(batch, length)
        if name == "bert":
            inputs["token_type_ids"] = np.arange(length)[None].repeat(batch, 0) * 2 // length
        agree(model, graph, inputs, names)


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False)])
def test_pooling_is_in_the_graph(exported: Callable[..., Exported], pooling: str, normalize: bool) -> None:
    model, out, document = exported("sentence_transformer", pooling=pooling, normalize=normalize)
    assert document["pooling"] == pooling
    inputs = {**text(3, 9), "token_type_ids": np.zeros((3, 9), np.int64)}
    tokens, found = session(out / "model.onnx").run(["last_hidden_state", "sentence_embedding"], inputs)
    agree(model, session(out / "model.onnx"), inputs, ["last_hidden_state"])
    for row, mask in enumerate(inputs["attention_mask"].astype(bool)):
        wanted = tokens[row][mask].mean(0) if pooling == "mean" else tokens[row][0]
        if normalize:
            wanted = wanted / np.linalg.norm(wanted)
        assert np.abs(found[row] - wanted).max() < 1e-5


def test_image_classification(exported: Callable[..., Exported]) -> None:
    model, out, document = exported("vit")
    assert document["interface"]["inputs"][0]["shape"] == ["batch", 3, 32, 32]
    for batch in (1, 4):
        pixels = np.random.default_rng(0).standard_normal((batch, 3, 32, 32), dtype=np.float32)
        agree(model, session(out / "model.onnx"), {"pixel_values": pixels}, ["logits"])


def empty_past(facts: dict[str, Any], batch: int) -> dict[str, np.ndarray]:
    shape = (batch, facts["kv_heads"], 0, facts["head_dim"])
    names = [f"past_key_values.{i}.{part}" for i in range(facts["layers"]) for part in ("key", "value")]
    return dict.fromkeys(names, np.zeros(shape, np.float32))


@pytest.mark.parametrize("name", ["llama", "gpt2", pytest.param("qwen3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_decoder_prefill_and_decode_with_padding(exported: Callable[..., Exported], name: str, side: str) -> None:
    """A padded batch with an empty cache, then two steps on the cache, against transformers without a cache."""
    model, out, document = exported(name)
    facts = document["decoder"]
    assert (facts["vocab_size"], facts["eos_token_ids"], facts["cache"]) == (models.VOCAB, [models.EOS], "concat")
    graph = session(out / "model.onnx")
    batch, length, steps = 3, 12, 2
    ids = np.random.default_rng(1).integers(5, models.VOCAB, (batch, length + steps))
    mask = np.ones_like(ids)
    for row in range(1, batch):
        if side == "left":
            mask[row, : 2 * row] = 0
        else:  # a shorter prompt: the gap stays in the cache, between the prompt and what follows
            mask[row, length - 2 * row : length] = 0
    positions = (mask.cumsum(1) - 1).clip(min=0)
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        wanted = model(**{key: torch.from_numpy(value) for key, value in given.items()}).logits
    past, start = empty_past(facts, batch), 0
    for stop in range(length, length + steps + 1):
        given = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop], **past}
        logits, *present = graph.run(None, given)
        keep = mask[:, start:stop].astype(bool)
        assert np.isfinite(logits).all()
        assert np.abs(logits - wanted[:, start:stop].numpy())[keep].max() < TOLERANCE
        past, start = dict(zip(past, present, strict=True)), stop
    assert past["past_key_values.0.key"].shape[2] == length + steps


def greedy_with_graphs(out: Path, document: dict[str, Any], source: dict[str, np.ndarray], count: int) -> np.ndarray:
    """[B, count] tokens from encoder.onnx and decoder.onnx, one decoder step per token."""
    facts = document["decoder"]
    encoder, decoder = (session(out / document["components"][part]) for part in ("encoder", "decoder"))
    names = [value.name for value in encoder.get_outputs()]
    encoded = dict(zip(names, encoder.run(None, source), strict=True))
    batch = len(encoded.pop("encoder_hidden_states"))
    if "attention_mask" in source:
        encoded["encoder_attention_mask"] = source["attention_mask"]
    past = empty_past(facts, batch)
    tokens = [np.full((batch, 1), facts["decoder_start_token_id"])]
    for _ in range(count):
        logits, *present = decoder.run(None, {"input_ids": tokens[-1], **encoded, **past})
        past = dict(zip(past, present, strict=True))
        tokens.append(logits[:, -1:].argmax(-1))
    return np.concatenate(tokens[1:], 1)


@pytest.mark.parametrize("name", ["t5", "whisper", pytest.param("bart", marks=pytest.mark.slow)])
def test_seq2seq_greedy_loop_equals_generate(exported: Callable[..., Exported], name: str) -> None:
    model, out, document = exported(name)
    assert document["kind"] == "seq2seq"
    for batch in (1, 3):
        if name == "whisper":
            source = {"input_features": np.random.default_rng(2).standard_normal((batch, 16, 100), dtype=np.float32)}
        else:
            source = text(batch, 13)
        given = {key: torch.from_numpy(value) for key, value in source.items()}
        with torch.no_grad():
            # Not model.generate: Whisper's own adds language tokens and timestamps.
            tokens = GenerationMixin.generate(model, **given, max_new_tokens=16, do_sample=False, eos_token_id=None)
        start = document["decoder"]["decoder_start_token_id"]
        assert (tokens[:, 0] == start).all()
        np.testing.assert_array_equal(greedy_with_graphs(out, document, source, 16), tokens[:, 1:].numpy())


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_seq2seq_logits_of_a_whole_answer(exported: Callable[..., Exported], name: str) -> None:
    model, out, document = exported(name)
    source = text(2, 13)
    if name == "whisper":
        source = {"input_features": np.random.default_rng(3).standard_normal((2, 16, 100), dtype=np.float32)}
    answer = np.random.default_rng(4).integers(5, models.VOCAB, (2, 9))
    encoder, decoder = (session(out / f"{part}.onnx") for part in ("encoder", "decoder"))
    encoded = dict(zip([value.name for value in encoder.get_outputs()], encoder.run(None, source), strict=True))
    hidden = encoded.pop("encoder_hidden_states")
    with torch.no_grad():
        given = {key: torch.from_numpy(value) for key, value in source.items()}
        wanted = model(**given, decoder_input_ids=torch.from_numpy(answer))
    assert np.abs(hidden - wanted.encoder_last_hidden_state.numpy()).max() < TOLERANCE
    if "attention_mask" in source:
        encoded["encoder_attention_mask"] = source["attention_mask"]
    given = {"input_ids": answer, **encoded, **empty_past(document["decoder"], 2)}
    assert np.abs(decoder.run(["logits"], given)[0] - wanted.logits.numpy()).max() < TOLERANCE


def test_another_process_writes_the_same_bytes(exported: Callable[..., Exported], tmp_path: Path) -> None:
    _, out, _ = exported("vit")
    code = (
        "import sys; from pathlib import Path; from pipeline.stages.onnx.torch import *;"
        "from pipeline.step import silent;"
        "STAGE.run({'model': Path(sys.argv[1])}, TorchExportOptions(), Path(sys.argv[2]), silent)"
    )
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    subprocess.run([sys.executable, "-c", code, out.parent / "model", moved], check=True, cwd=ROOT)
    for name in ("model.onnx", "export.json"):
        assert digest(moved / name) == digest(out / name)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_graphs_tell_nothing_of_the_machine(exported: Callable[..., Exported]) -> None:
    _, out, _ = exported("vit")
    raw = (out / "model.onnx").read_bytes()
    for trace in (str(ROOT).encode(), b"site-packages", b"stack_trace", b"s77", b".py"):
        assert trace not in raw


def test_large_models_get_one_aligned_data_file(
    exported: Callable[..., Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, embedded, _ = exported("vit")
    monkeypatch.setattr(onnx_torch_save, "EMBED_LIMIT_BYTES", 1 << 16)
    export(embedded.parent / "model", tmp_path / "export")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "export.json",
        "model.onnx",
        "model.onnx.data",
    ]
    stored = onnx.load(tmp_path / "export" / "model.onnx", load_external_data=False)
    for tensor in stored.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert int(entries.get("offset", 0)) % 4096 == 0
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    agree(model, session(tmp_path / "export" / "model.onnx"), {"pixel_values": pixels}, ["logits"])


def test_an_older_opset(tmp_path: Path) -> None:
    folder = models.vit(tmp_path / "model")
    export(folder, tmp_path / "export", opset=20)
    assert onnx.load(tmp_path / "export" / "model.onnx").opset_import[0].version == 20


def test_a_state_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    folder = tmp_path / "mamba"
    models.write_tokenizer(folder)
    config = MambaConfig(vocab_size=models.VOCAB, hidden_size=32, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(folder)
    with pytest.raises(StageError, match=r"mamba.*keys and values"):
        export(folder, tmp_path / "export")


def test_unknown_pooling_is_refused(tmp_path: Path) -> None:
    folder = models.sentence_transformer(tmp_path / "model", pooling="max")
    with pytest.raises(RecipeError, match="max"):
        export(folder, tmp_path / "export")
