"""`enginewright inspect`: what a person and a program learn of an artifact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeline.cli.inspect import inspect
from tests.artifact.helpers import build, edit_manifest, facts, parity


def invoke(*arguments: object) -> tuple[Result, int]:
    """The result and the exit code that `enginewright` would give."""
    result = CliRunner().invoke(inspect, [str(argument) for argument in arguments])
    return result, getattr(result.exception, "exit_code", result.exit_code)


def row(result: Result, start: str) -> str:
    """The line that starts with these words."""
    return next(line for line in result.stdout.splitlines() if line.startswith(start))


def test_what_a_person_reads(tmp_path: Path) -> None:
    made = build(tmp_path)
    result, code = invoke(made.path)
    assert code == 0
    assert made.artifact_id in row(result, "artifact")
    assert "linux x86_64 cpu" in row(result, "machine")
    assert row(result, "precision").endswith("int4")
    assert "group_size 32" in row(result, "quantization")
    assert "ratio 0.5" in row(result, "quantization")
    assert "onnxruntime >=1.30" in row(result, "packages")
    assert "hf://org/tiny at cccc" in row(result, "source model")
    assert row(result, "command").endswith(f"enginewright generate {made.path}")
    assert row(result, "tokenizer").endswith("18 B")
    assert "[batch, sequence]" in row(result, "input_ids")
    assert row(result, "graph").split()[1] == "model.onnx"
    assert "parity: passed on 8 held-out samples" in result.stdout
    assert row(result, "kld_mean").split() == ["kld_mean", "0.001", "0.002", "passed"]
    assert row(result, "kld_max").split() == ["kld_max", "-", "off"]


def test_what_is_deferred_says_why_and_shows_no_value(tmp_path: Path) -> None:
    attestation = parity("deferred", reason="no GPU here", metrics={}, passed=(), samples=0)
    result, _ = invoke(build(tmp_path, attestations={"parity": attestation}).path)
    assert "parity: deferred: no GPU here" in result.stdout
    assert row(result, "kld_mean").split() == ["kld_mean", "-", "0.002", "not", "judged"]


def test_without_attestations_it_says_how_to_get_one(tmp_path: Path) -> None:
    result, code = invoke(build(tmp_path, attestations={}).path)
    assert code == 0
    assert "verify --run --attest" in result.stdout


def test_one_json_document(tmp_path: Path) -> None:
    made = build(tmp_path)
    result, code = invoke(made.path, "--format", "json")
    document = json.loads(result.stdout)
    assert code == 0
    assert document["artifact_id"] == made.artifact_id
    assert document["manifest"] == json.loads((made.path / "manifest.json").read_bytes())
    assert document["attestations"]["parity"]["predicate"]["verdict"] == "passed"


def test_text_from_outside_cannot_steer_the_terminal(tmp_path: Path) -> None:
    made = build(tmp_path, manifest_facts=facts(description="a\x1b[31m\u202eb", quantization={"method": "\x07"}))
    result, code = invoke(made.path)
    assert code == 0
    assert not any(char in result.stdout for char in "\x1b\x07\u202e")
    result, _ = invoke(made.path, "--format", "json")
    assert not any(char in result.stdout for char in "\x1b\x07\u202e")


def test_a_broken_manifest_is_exit_code_6_with_the_place(tmp_path: Path) -> None:
    made = build(tmp_path)
    edit_manifest(made.path, gates={"kld_mean": "low"})
    result, code = invoke(made.path)
    assert code == 6
    assert "$.gates.kld_mean" in str(result.exception)


def test_an_attestation_of_another_artifact_is_not_shown(tmp_path: Path) -> None:
    made = build(tmp_path)
    edit_manifest(made.path, version="2.0.0")
    result, code = invoke(made.path)
    assert code == 6
    assert "another artifact" in str(result.exception)


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_what_is_no_folder_is_a_usage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    _, code = invoke(tmp_path / name)
    assert code == 64
