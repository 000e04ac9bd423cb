"""`enginewright verify` as a user meets it: text, JSON and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pipeline.artifact import prove
from pipeline.artifact.attest import ParityResult
from pipeline.artifact.prove import Proof
from pipeline.artifact.verify import Report
from pipeline.cli.verify import verify
from pipeline.parity.gates import Outcome, Verdict
from tests.artifact.helpers import build, rewrite

ROOT = Path(__file__).parents[2]


def invoke(*arguments: object) -> tuple[Result, int]:
    """The result and the exit code that `enginewright` would give."""
    result = CliRunner().invoke(verify, [str(argument) for argument in arguments])
    return result, getattr(result.exception, "exit_code", result.exit_code)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return build(tmp_path, link="copy").path


def proving(monkeypatch: pytest.MonkeyPatch, outcome: Outcome, **changes: Any) -> None:
    """Let --run find this outcome of one gate."""

    def fake(report: Report, *, write: bool) -> Proof:
        verdict = Verdict("kld_mean", 0.5, 0.002, "max", outcome)
        names = {outcome: ("kld_mean",)}
        result = ParityResult(
            verdict="failed" if outcome is Outcome.FAILED else "passed",
            passed=names.get(Outcome.PASSED, ()),
            failed=names.get(Outcome.FAILED, ()),
            reason="kld_mean is bad" if outcome is Outcome.FAILED else "",
            samples=2,
        )
        place = report.path / ".attest/parity.json" if write else None
        return Proof(report, ParityResult(**{**vars(result), **changes}), (verdict,), place)

    monkeypatch.setattr(prove, "prove", fake)


def test_an_artifact_that_is_whole(artifact: Path) -> None:
    result, code = invoke(artifact)
    assert code == 0
    assert "8 files" in result.stdout
    assert "artifact sha256:" in result.stdout


def test_one_json_document(artifact: Path) -> None:
    result, code = invoke(artifact, "--format", "json")
    document = json.loads(result.stdout)
    assert code == 0
    assert document["ok"] is True
    assert document["artifact_id"].startswith("sha256:")
    assert (document["files"], document["problems"], document["warnings"]) == (8, [], [])


def test_every_problem_and_exit_code_6(artifact: Path) -> None:
    rewrite(artifact / "model.onnx", b"x")
    (artifact / "tokenizer.json").unlink()
    result, code = invoke(artifact)
    assert code == 6
    assert "model.onnx: has 1 bytes" in str(result.exception)
    assert "tokenizer.json: is missing" in str(result.exception)
    result, code = invoke(artifact, "--format", "json")
    assert code == 6
    assert len(json.loads(result.stdout)["problems"]) == 2


def test_no_such_folder_is_a_usage_error(tmp_path: Path) -> None:
    _, code = invoke(tmp_path / "nothing")
    assert code == 64


def test_attest_needs_run(artifact: Path) -> None:
    result, code = invoke(artifact, "--attest")
    assert code == 64
    assert "--run" in str(result.exception)


def test_run_that_passes(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proving(monkeypatch, Outcome.PASSED)
    result, code = invoke(artifact, "--run", "--attest")
    assert code == 0
    assert "golden inputs on this machine (2 samples): passed" in result.stdout
    assert "parity.json" in result.stdout
    result, _ = invoke(artifact, "--run", "--format", "json")
    parity = json.loads(result.stdout)["parity"]
    assert (parity["verdict"], parity["attestation"]) == ("passed", None)
    assert parity["gates"] == [{"metric": "kld_mean", "value": 0.5, "threshold": 0.002, "outcome": "passed"}]


def test_run_that_fails_a_gate_is_exit_code_4(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proving(monkeypatch, Outcome.FAILED)
    result, code = invoke(artifact, "--run")
    assert code == 4
    assert "kld_mean is bad" in str(result.exception)
    assert "failed" in result.stdout


def test_run_that_judged_nothing_is_not_success(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proving(monkeypatch, Outcome.OFF, verdict="deferred", skipped=("top1",))
    result, code = invoke(artifact, "--run")
    assert code == 4
    assert "top1" in str(result.exception)


def test_a_damaged_artifact_is_not_run(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "prove", lambda *_, **__: pytest.fail("it was run"))
    rewrite(artifact / "model.onnx", b"x")
    for form in ("text", "json"):
        _, code = invoke(artifact, "--run", "--format", form)
        assert code == 6


def test_the_command_as_installed_loads_nothing_heavy(artifact: Path) -> None:
    script = (
        "import sys; from pipeline.cli.main import run\n"
        f"code = run(['verify', {str(artifact)!r}])\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'transformers', 'rich'} & set(sys.modules)\n"
        "sys.exit(code or (str(heavy) if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rewrite(artifact / "model.onnx", b"x")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 6
    assert "Traceback" not in done.stderr
    assert "model.onnx" in done.stderr
