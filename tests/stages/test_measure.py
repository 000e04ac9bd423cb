"""Stage parity against engines whose every answer, and every fault, is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import StageError, UnavailableError, VerificationError
from pipeline.parity import gates
from pipeline.parity.gates import Outcome
from pipeline.stages.measure import MeasureOptions, run
from pipeline.step import silent
from tests.parity.bigram import START, VOCAB, Bigram, table, write_decoder, write_encoder, write_seq2seq

OPENER = "tests.parity.bigram:open_engine"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def measure(reference: Path, tmp_path: Path, interface: list[str] | None = None, **settings: Any) -> dict[str, Any]:
    engine, out = tmp_path / "engine", tmp_path / "out"
    engine.mkdir(exist_ok=True)
    out.mkdir(exist_ok=True)
    if json.loads((reference / "reference.json").read_text())["kind"] == "encoder":
        (engine / "encoder").touch()
    if interface:
        (engine / "engine.json").write_text(json.dumps({"interface": {"inputs": [{"name": n} for n in interface]}}))
    run({"engine": engine, "reference": reference}, MeasureOptions(opener=OPENER, settings=settings), out, silent)
    found: dict[str, Any] = json.loads((out / "report.json").read_text("utf-8"))
    return found


def failed(report: dict[str, Any], precision: str = "fp32") -> set[str]:
    verdicts = gates.evaluate(report["metrics"], report["kind"], precision, task=report["task"])
    return {verdict.metric for verdict in verdicts if verdict.outcome is Outcome.FAILED}


def test_an_exact_decoder(decoder: Path, tmp_path: Path) -> None:
    report = measure(decoder, tmp_path)
    metrics = report["metrics"]
    assert metrics["kld_max"] == 0.0
    assert metrics["top1"] == metrics["top5"] == metrics["greedy_equal"] == metrics["perplexity_ratio"] == 1.0
    assert metrics["greedy_prefix_mean"] == metrics["greedy_prefix_min"] == 10
    assert metrics["padding_max_abs"] == 0.0
    assert metrics["decode_max_abs"] < 1e-6
    assert failed(report) == set()
    assert (report["kind"], report["task"], report["samples"]) == ("decoder", "text-generation", 6)
    assert len(report["per_sample"]) == 6
    assert np.load(tmp_path / "out" / "kld.npy").shape == (240,)


def test_noise_gives_the_divergence_of_the_tables(decoder: Path, tmp_path: Path) -> None:
    report = measure(decoder, tmp_path, noise=0.1)
    ids = np.load(decoder / "inputs.input_ids.npy")
    p, q = (np.exp(t.astype(np.float64)) for t in (table(), Bigram(noise=0.1).table))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    kld = (p * np.log(p / q)).sum(1)[ids]
    assert report["metrics"]["kld_mean"] == pytest.approx(kld.mean(), rel=1e-9)
    assert report["metrics"]["kld_max"] == pytest.approx(kld.max(), rel=1e-9)
    nll = -np.log(q[ids[:, :-1], ids[:, 1:]])
    assert report["metrics"]["perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-9)
    worst = report["worst"]["kld"]
    assert (worst["sample"], worst["position"]) == tuple(np.unravel_index(kld.argmax(), kld.shape))
    assert worst["value"] == pytest.approx(kld.max(), rel=1e-9)
    assert worst["token_ids"][-1] == ids[worst["sample"], worst["position"]]
    assert [each["kld_mean"] for each in report["per_sample"]] == pytest.approx(kld.mean(1).tolist(), rel=1e-9)
    assert "kld_mean" in failed(report)


def test_a_shift_of_all_logits_is_no_fault(decoder: Path, tmp_path: Path) -> None:
    assert failed(measure(decoder, tmp_path, shift=8)) == set()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_nan_fails_every_gate(tmp_path: Path, value: float, precision: str) -> None:
    path = tmp_path / "reference"
    write_decoder(path)
    ids = np.load(path / "inputs.input_ids.npy")
    ids[2, 5] = 3  # the one token whose row is broken
    np.save(path / "inputs.input_ids.npy", ids)
    logits = np.load(path / "outputs.logits.npy")
    logits[2, 5] = table()[3]
    np.save(path / "outputs.logits.npy", logits)
    report = measure(path, tmp_path, nan=value)
    assert report["metrics"]["nonfinite"] == 1
    assert report["metrics"]["kld_mean"] is None
    assert failed(report, precision) == set(gates.defaults("decoder", precision))
    assert report["worst"]["nonfinite"] == {"sample": 2, "value": 1.0}


def test_padding_that_leaks(decoder: Path, tmp_path: Path) -> None:
    report = measure(decoder, tmp_path, padding_bug=0.5)
    assert report["metrics"]["padding_max_abs"] == pytest.approx(0.5, abs=1e-5)
    assert failed(report) == {"padding_max_abs"}


def test_a_decode_path_that_differs(decoder: Path, tmp_path: Path) -> None:
    report = measure(decoder, tmp_path, decode_bug=0.25)
    assert report["metrics"]["decode_max_abs"] == pytest.approx(0.25, abs=1e-5)
    assert failed(report) == {"decode_max_abs"}


def test_another_continuation(decoder: Path, tmp_path: Path) -> None:
    report = measure(decoder, tmp_path, flip=True)
    assert report["metrics"]["greedy_equal"] == report["metrics"]["greedy_prefix_min"] == 0
    worst, greedy = report["worst"]["greedy"], json.loads((decoder / "greedy.json").read_text())
    assert worst["prefix"] == worst["value"] == 0
    assert worst["reference"] == greedy["tokens"][worst["prompt"]]
    assert worst["engine"] != worst["reference"]
    assert failed(report) == {"greedy_equal"}


def test_the_report_is_the_same_twice(decoder: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    measure(decoder, tmp_path / "a", noise=0.1)
    measure(decoder, tmp_path / "b", noise=0.1)
    for name in ("report.json", "kld.npy"):
        assert (tmp_path / "a/out" / name).read_bytes() == (tmp_path / "b/out" / name).read_bytes()


@pytest.mark.parametrize("speech", [False, True])
def test_encoder_decoders(tmp_path: Path, speech: bool) -> None:
    reference = write_seq2seq(tmp_path / "reference", speech)
    report = measure(reference, tmp_path, start=START)
    assert report["metrics"]["kld_max"] == report["metrics"]["padding_max_abs"] == 0.0
    assert report["metrics"]["greedy_equal"] == 1.0
    assert failed(report) == set()
    assert report["task"] == ("automatic-speech-recognition" if speech else "text2text-generation")
    assert np.load(tmp_path / "out" / "kld.npy").shape == (7 + 8 + 9 + 10,)
    noisy = measure(reference, tmp_path, start=START, noise=0.3)
    assert {"kld_mean"} <= failed(noisy)
    assert noisy["worst"]["kld"]["token_ids"][0] == START


def test_an_exact_encoder(encoder: Path, tmp_path: Path) -> None:
    report = measure(encoder, tmp_path, interface=["input_ids", "attention_mask"])
    metrics = report["metrics"]
    assert metrics["cosine_min"] == pytest.approx(1.0, abs=1e-12)
    assert metrics["max_abs_error"] == 0.0
    assert metrics["spearman"] == pytest.approx(1.0)
    assert "top1" not in metrics
    assert failed(report) == set()
    assert set(report["outputs"]) == {"last_hidden_state", "sentence_embedding"}


def test_scale_is_seen_by_the_error_and_not_by_the_cosine(encoder: Path, tmp_path: Path) -> None:
    report = measure(encoder, tmp_path, scale=1.5)
    assert report["metrics"]["cosine_min"] == pytest.approx(1.0, abs=1e-9)
    assert report["metrics"]["max_rel_error"] == pytest.approx(0.5, rel=1e-6)
    assert failed(report) == {"max_rel_error"}


def test_encoder_noise_names_the_worst_sample(encoder: Path, tmp_path: Path) -> None:
    report = measure(encoder, tmp_path, noise=1.0)
    worst = report["worst"]["cosine"]
    assert worst["output"] == "sentence_embedding"
    assert worst["value"] == report["metrics"]["cosine_min"] == report["per_sample"][worst["sample"]]["cosine_min"]
    assert report["outputs"]["last_hidden_state"]["cosine_min"] != report["metrics"]["cosine_min"]
    assert {"cosine_min", "spearman"} <= failed(report)


def test_encoder_padding_that_leaks(encoder: Path, tmp_path: Path) -> None:
    assert failed(measure(encoder, tmp_path, padding_bug=True)) == {"padding_max_abs"}


def test_encoder_without_an_embedding_is_judged_by_its_tokens(encoder: Path, tmp_path: Path) -> None:
    report = measure(encoder, tmp_path, without=("sentence_embedding",), noise=0.1)
    assert report["worst"]["cosine"]["output"] == "last_hidden_state"
    assert set(report["outputs"]) == {"last_hidden_state"}
    assert report["metrics"]["spearman"] < 1


def test_encoder_nan(encoder: Path, tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "reference")
    ids = np.load(path / "inputs.input_ids.npy")
    ids[1, 0] = 3
    np.save(path / "inputs.input_ids.npy", ids)
    report = measure(path, tmp_path, nan=True)
    assert report["metrics"]["cosine_min"] is None
    assert report["metrics"]["spearman"] is None
    assert failed(report, "int4") == set(gates.defaults("encoder", "int4", "feature-extraction"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fail": True}, "the engine failed on sample 0: out of nodes"),
        ({"vocab": VOCAB - 1}, r"'logits' has shape \[1, 40, 49\], and the reference's \[1, 40, 50\]"),
    ],
)
def test_engines_that_fail(decoder: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StageError, match=message):
        measure(decoder, tmp_path, **settings)


def test_an_interface_that_does_not_fit(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="takes the input 'pixel_values', and the reference has input_ids"):
        measure(encoder, tmp_path, interface=["pixel_values"])
    with pytest.raises(StageError, match="gives nothing, and the reference last_hidden_state"):
        (tmp_path / "engine" / "engine.json").unlink()
        measure(encoder, tmp_path, without=("sentence_embedding", "last_hidden_state"))
    (tmp_path / "engine" / "engine.json").write_text("{")
    with pytest.raises(StageError, match="no readable interface"):
        measure(encoder, tmp_path)


@pytest.mark.parametrize("opener", ["no_such_module:open", "tests.parity.bigram:no_such_function"])
def test_an_opener_that_is_not_there(decoder: Path, tmp_path: Path, opener: str) -> None:
    with pytest.raises(UnavailableError, match="cannot be opened by"):
        run({"engine": tmp_path, "reference": decoder}, MeasureOptions(opener=opener), tmp_path, silent)


def test_a_damaged_reference(tmp_path: Path) -> None:
    path = write_decoder(tmp_path / "reference")
    whole = (path / "outputs.logits.npy").read_bytes()
    (path / "outputs.logits.npy").write_bytes(whole[:-1])
    with pytest.raises(VerificationError, match=r"outputs.logits.npy: .* do not fit"):
        measure(path, tmp_path)
    (path / "outputs.logits.npy").unlink()
    with pytest.raises(VerificationError, match=r"outputs.logits.npy: not a readable array"):
        measure(path, tmp_path)
    (path / "reference.json").write_text("{}")
    with pytest.raises(VerificationError, match="the field 'inputs' is missing"):
        from pipeline.parity.stored import Stored

        Stored.open(path)
