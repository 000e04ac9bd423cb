"""`verify --run`: a real child process with a fake runtime that is found as plug-ins are, by an entry point."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.artifact import attest
from pipeline.artifact.manifest import Interface, Runtime, TensorSpec
from pipeline.artifact.prove import CHILD, verify_run
from pipeline.errors import StageError, UnavailableError, VerificationError
from tests.artifact.helpers import build, facts, parity, rewrite

RUNTIME = """
import os, signal, sys
import numpy as np
from pipeline.hardware import Verdict

EXTRA = "fake"

class FakeEngine:
    def __init__(self, mode):
        self.mode = mode
    def run(self, inputs):
        if self.mode == "crash":
            print("about to crash", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.mode == "exit":
            os._exit(77)
        if self.mode == "raise":
            raise ZeroDivisionError("a fault of the engine")
        out = inputs["input_ids"].astype(np.float32) * 0.5
        if self.mode == "wrong":
            out = -out[:, ::-1]
        if self.mode == "nan":
            out = out * np.nan
        return {"sentence_embedding": out}

def can_run(manifest, hardware):
    if manifest["target"]["name"] == "moon":
        return Verdict(False, "it needs a moon")
    return Verdict(True, "anywhere")

def open(engine, hardware):
    mode = (engine / "mode").read_text()
    if mode == "missing":
        import a_package_that_nobody_has
    return FakeEngine(mode)
"""


def write_golden(folder: Path) -> Path:
    """Two samples of an encoder whose embedding is half its input ids."""
    folder.mkdir()
    ids = np.arange(1, 17, dtype=np.int64).reshape(2, 8)
    np.save(folder / "inputs.input_ids.npy", ids)
    np.save(folder / "outputs.sentence_embedding.npy", (ids * 0.5).astype(np.float32))
    about = {
        "task": "feature-extraction",
        "kind": "encoder",
        "inputs": ["input_ids"],
        "outputs": ["sentence_embedding"],
    }
    about |= {"samples": 2, "source": "data", "lengths": {}, "kept": {}, "eos_token_ids": []}
    (folder / "golden.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that builds an artifact of the fake runtime, whose engine behaves as `mode` says."""
    plugin = tmp_path / "plugin"
    (plugin / "fake_runtime-1.0.dist-info").mkdir(parents=True)
    (plugin / "fake_runtime.py").write_text(RUNTIME)
    (plugin / "fake_runtime-1.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: fake-runtime\nVersion: 1.0\n"
    )
    (plugin / "fake_runtime-1.0.dist-info/entry_points.txt").write_text("[enginewright.targets]\nfake = fake_runtime\n")
    monkeypatch.setenv("PYTHONPATH", str(plugin))

    def make(mode: str = "right", **changes: Any) -> Path:
        engine = tmp_path / "engine"
        engine.mkdir()
        (engine / "mode").write_text(mode)
        tensors = (TensorSpec(name="input_ids", dtype="int64", shape=("batch", 8)),)
        given = {
            "runtime": Runtime(engine="fake", layout="plain"),
            "interface": Interface(task="feature-extraction", kind="encoder", inputs=tensors),
            "gates": {"cosine_mean": "0.999", "max_abs_error": "0.001", "cosine_min": None},
            "precision": "fp32",
        }
        golden = changes.pop("golden_dir", None) or write_golden(tmp_path / "golden")
        about = facts(**{**given, **changes.pop("facts", {})})
        deferred = parity("deferred", reason="not here", metrics={}, passed=())
        attestations = changes.pop("attestations", {"parity": deferred})
        made = build(tmp_path, golden_dir=golden, manifest_facts=about, attestations=attestations, **changes)
        return made.path

    return make


def test_an_engine_that_answers_as_the_reference_passes_and_is_attested(make: Any) -> None:
    artifact = make()
    proof = verify_run(artifact)
    assert proof.result.verdict == "passed"
    assert set(proof.result.passed) == {"cosine_mean", "max_abs_error"}
    assert proof.result.samples == 2
    assert proof.attestation is None
    before = attest.read_attestation(artifact, "parity", proof.report.artifact_id or "")
    assert before and before["predicate"]["verdict"] == "deferred"

    proof = verify_run(artifact, write=True)
    after = attest.read_attestation(artifact, "parity", proof.report.artifact_id or "")
    assert after
    assert (after["predicate"]["verdict"], after["predicate"]["inputs"]) == ("passed", "golden")
    assert after["predicate"]["metrics"]["max_abs_error"] == 0
    assert after["predicate"]["thresholds"]["cosine_min"] is None
    assert after["predicate"]["host"]["arch"]
    assert verify_run(artifact, write=True).report.ok


@pytest.mark.parametrize("mode", ["wrong", "nan"])
def test_an_engine_that_answers_otherwise_fails_and_that_is_attested_too(make: Any, mode: str) -> None:
    artifact = make(mode)
    proof = verify_run(artifact, write=True)
    assert proof.result.verdict == "failed"
    assert "cosine_mean" in proof.result.reason
    said = attest.read_attestation(artifact, "parity", proof.report.artifact_id or "")
    assert said and said["predicate"]["result"] == "FAILED"


def test_what_the_build_measured_on_held_out_data_is_kept(make: Any) -> None:
    artifact = make(attestations={"parity": parity()})
    before = (artifact / ".attest/parity.json").read_bytes()
    proof = verify_run(artifact, write=True)
    assert proof.attestation == artifact / ".attest/parity-golden.json"
    assert (artifact / ".attest/parity.json").read_bytes() == before


def test_gates_of_the_manifest_alone_count(make: Any) -> None:
    proof = verify_run(make("wrong", facts={"gates": {"cosine_mean": None}}))
    assert (proof.result.verdict, proof.result.reason) == ("deferred", "every gate is switched off")


def test_a_gate_that_so_few_inputs_cannot_judge_is_said_to_be_skipped(make: Any) -> None:
    proof = verify_run(make(facts={"gates": {"top1": "0.9", "cosine_mean": "0.9"}}))
    assert (proof.result.passed, proof.result.skipped) == (("cosine_mean",), ("top1",))


def test_a_native_crash_is_reported_with_its_signal_and_log(make: Any) -> None:
    with pytest.raises(StageError, match="SIGSEGV") as caught:
        verify_run(make("crash"))
    assert caught.value.exit_code == 3
    assert "about to crash" in caught.value.message
    assert "run_golden" in caught.value.hint


@pytest.mark.parametrize(("mode", "why"), [("exit", "exit code 77"), ("raise", "a fault of the engine")])
def test_an_engine_that_fails_is_a_stage_error(make: Any, mode: str, why: str) -> None:
    with pytest.raises(StageError, match=why):
        verify_run(make(mode))


def test_a_runtime_that_is_not_installed_names_the_extra(make: Any) -> None:
    with pytest.raises(UnavailableError, match="a_package_that_nobody_has") as caught:
        verify_run(make("missing"))
    assert caught.value.exit_code == 5
    assert "enginewright[fake]" in caught.value.hint


def test_a_machine_that_cannot_run_it_is_told_why(make: Any) -> None:
    with pytest.raises(UnavailableError, match="it needs a moon"):
        verify_run(make(facts={"target": replace(facts().target, name="moon")}))


def test_an_unknown_runtime(make: Any) -> None:
    with pytest.raises(UnavailableError, match="warp"):
        verify_run(make(facts={"runtime": Runtime(engine="warp", layout="plain")}))


def test_no_golden_inputs(tmp_path: Path, make: Any) -> None:
    engine = tmp_path / "engine"
    artifact = make()
    made = build(
        tmp_path,
        golden_dir=None,
        destination=tmp_path / "none",
        manifest_facts=facts(runtime=Runtime(engine="fake", layout="plain")),
    )
    assert engine.exists() and artifact.exists()
    with pytest.raises(VerificationError, match="no golden inputs"):
        verify_run(made.path)


def test_a_damaged_artifact_is_not_run(make: Any, tmp_path: Path) -> None:
    artifact = make("crash")
    rewrite(artifact / "mode", b"cras_")
    ran = tmp_path / "ran"
    child = (sys.executable, "-c", f"open({str(ran)!r}, 'w')")
    with pytest.raises(VerificationError, match="mode: has other contents"):
        verify_run(artifact, child=child)
    assert not ran.exists()


def test_modules_in_the_artifact_are_not_imported(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile").mkdir()
    (tmp_path / "hostile/numpy.py").write_text("raise SystemExit('hostile')")
    monkeypatch.chdir(tmp_path / "hostile")
    assert "-P" in CHILD
    assert verify_run(make()).result.verdict == "passed"
