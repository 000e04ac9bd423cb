"""Golden sets: small, and good enough to tell a working engine from a broken one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import StageError
from pipeline.parity import gates
from pipeline.stages import golden
from pipeline.stages.golden import GoldenOptions, judge_golden, run, write_golden
from pipeline.step import silent
from tests.parity.bigram import START, VOCAB, Bigram, Vectors, write_decoder, write_encoder, write_seq2seq


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("decoder"), samples=8, length=100)


@pytest.fixture
def kept_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "KEPT_BYTES", 0)  # as with a large vocabulary


def test_a_decoder_is_cut(reference: Path, tmp_path: Path, kept_four: None) -> None:
    run({"reference": reference}, GoldenOptions(count=2), tmp_path, silent)
    info = json.loads((tmp_path / "golden.json").read_text())
    assert (info["samples"], info["kept"], info["lengths"]["logits"]) == (2, {"logits": 4}, [64, 64])
    assert np.load(tmp_path / "inputs.input_ids.npy").shape == (2, 64)
    logits = np.load(tmp_path / "outputs.logits.npy")
    assert np.array_equal(logits, np.load(reference / "outputs.logits.npy")[:2, 60:64])
    greedy, whole = (json.loads((path / "greedy.json").read_text()) for path in (tmp_path, reference))
    assert greedy == {**whole, "prompts": whole["prompts"][:2], "tokens": whole["tokens"][:2]}


def test_small_rows_are_kept_whole(reference: Path, tmp_path: Path) -> None:
    write_golden(reference, tmp_path, 2)
    assert np.load(tmp_path / "outputs.logits.npy").shape == (2, 64, VOCAB)


def test_more_than_there_is_gives_all(reference: Path, tmp_path: Path) -> None:
    write_golden(reference, tmp_path, 16)
    assert json.loads((tmp_path / "golden.json").read_text())["samples"] == 8
    assert len(json.loads((tmp_path / "greedy.json").read_text())["prompts"]) == 3


def test_an_exact_engine_passes(reference: Path, tmp_path: Path, kept_four: None) -> None:
    write_golden(reference, tmp_path, 2)
    report = judge_golden(tmp_path, Bigram())
    assert report["metrics"]["kld_max"] == 0
    assert report["metrics"]["greedy_equal"] == 1
    assert report["samples"] == 2
    # Eight positions cannot tell a top-1 agreement of 0.95 from one of 0.8.
    assert "top1" not in report["metrics"]
    assert "perplexity_ratio" not in report["metrics"]
    assert set(report["metrics"]) <= set(gates.metrics())


def test_many_positions_keep_every_metric(reference: Path, tmp_path: Path) -> None:
    write_golden(reference, tmp_path, 4)
    assert judge_golden(tmp_path, Bigram())["metrics"]["top1"] == 1.0


@pytest.mark.parametrize(
    ("settings", "metric"),
    [({"noise": 0.3}, "kld_mean"), ({"padding_bug": 1}, "padding_max_abs"), ({"flip": True}, "greedy_equal")],
)
def test_broken_engines_fail(reference: Path, tmp_path: Path, kept_four: None, settings: dict, metric: str) -> None:
    write_golden(reference, tmp_path, 2)
    report = judge_golden(tmp_path, Bigram(**settings))
    verdicts = {v.metric: v for v in gates.evaluate(report["metrics"], "decoder", "fp32")}
    assert verdicts[metric].outcome is gates.Outcome.FAILED
    assert verdicts[metric].value is not None


def test_an_encoder(tmp_path: Path, kept_four: None) -> None:
    reference = write_encoder(tmp_path / "reference")
    out = tmp_path / "engine" / "golden"
    out.mkdir(parents=True)
    write_golden(reference, out, 2)
    info = json.loads((out / "golden.json").read_text())
    assert info["kept"] == {"last_hidden_state": 4}
    assert info["lengths"]["input_ids"] == info["lengths"]["last_hidden_state"] == [12, 11]
    assert np.load(out / "outputs.last_hidden_state.npy").shape[:2] == (2, 4)
    report = judge_golden(out, Vectors())
    assert report["metrics"]["cosine_min"] == pytest.approx(1)
    assert report["outputs"]["last_hidden_state"]["max_abs_error"] == 0
    assert judge_golden(out, Vectors(noise=1.0))["metrics"]["cosine_min"] < 0.99
    # The interface of the artifact around the golden set says which inputs the engine takes.
    (out.parent / "engine.json").write_text(json.dumps({"interface": {"inputs": [{"name": "pixel_values"}]}}))
    with pytest.raises(StageError, match="pixel_values"):
        judge_golden(out, Vectors())


@pytest.mark.parametrize("speech", [False, True])
def test_encoder_decoders(tmp_path: Path, kept_four: None, speech: bool) -> None:
    write_golden(write_seq2seq(tmp_path / "reference", speech), tmp_path, 2)
    logits = np.load(tmp_path / "outputs.logits.npy")
    assert logits.shape == (2, 4, VOCAB)
    whole = np.load(tmp_path / "reference" / "outputs.logits.npy")
    assert np.array_equal(logits[1], whole[1, 4:8])
    report = judge_golden(tmp_path, Bigram(start=START))
    assert report["metrics"]["kld_max"] == 0.0
    assert report["metrics"]["greedy_equal"] == 1.0


def test_equal_bytes(reference: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_golden(reference, tmp_path / name, 2)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    inputs = ("inputs.attention_mask.npy", "inputs.input_ids.npy")
    assert names == ["golden.json", "greedy.json", *inputs, "outputs.logits.npy"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
