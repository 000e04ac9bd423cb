"""Attestations: valid in-toto Statements, bound to one artifact, whole or absent."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pipeline.artifact import attest
from pipeline.artifact.attest import ParityResult, StepRun
from pipeline.artifact.manifest import freeze
from pipeline.errors import VerificationError
from tests.artifact.helpers import DIGEST, facts

ID = "sha256:" + "1" * 64
OTHER = "sha256:" + "2" * 64


def test_a_statement_names_its_artifact() -> None:
    said = attest.statement(attest.PARITY, ID, {"result": "PASSED"}, name="tiny")
    assert said["_type"] == "https://in-toto.io/Statement/v1"
    assert said["subject"] == [{"name": "tiny", "digest": {"sha256": "1" * 64}}]
    assert said["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"


def test_provenance_has_what_slsa_requires_and_the_cost_of_each_step() -> None:
    step = StepRun(name="export", key="k", cached=True, wall_s=1.5, peak_rss_bytes=7)
    kind, predicate = attest.provenance(
        facts(), started="2026-11-22T10:00:00+00:00", finished="2026-11-22T10:01:00+00:00", steps=[step]
    )
    assert kind == "https://slsa.dev/provenance/v1"
    definition, details = predicate["buildDefinition"], predicate["runDetails"]
    assert definition["buildType"] and definition["externalParameters"]["recipe"] == freeze(facts().recipe)
    assert definition["resolvedDependencies"][0]["digest"] == {"gitCommit": "c" * 40}
    assert details["builder"]["id"]
    assert details["byproducts"][0]["annotations"]["cached"] is True
    json.dumps(predicate, allow_nan=False)


@pytest.mark.parametrize("verdict", ["passed", "failed", "deferred"])
def test_only_what_ran_and_passed_is_called_passed(verdict: str) -> None:
    result = ParityResult(
        verdict=verdict,
        metrics={"kld_mean": 0.001},
        passed=("kld_mean",) if verdict == "passed" else (),
        failed=("kld_mean",) if verdict == "failed" else (),
        reason="" if verdict == "passed" else "because",
    )
    _, predicate = attest.parity(result, {"kld_mean": "0.002", "kld_max": None}, DIGEST)
    assert (predicate["result"] == "PASSED") == (verdict == "passed")
    assert predicate["result"] in ("PASSED", "WARNED", "FAILED")
    assert bool(predicate["passedTests"]) == (verdict == "passed")
    assert predicate["warnedTests"] == (["kld_mean"] if verdict == "deferred" else [])
    assert predicate["verdict"] == verdict


def test_writing_is_whole_or_nothing(tmp_path: Path) -> None:
    path = attest.write_attestation(tmp_path, "parity", attest.statement(attest.PARITY, ID, {"a": 1}))
    with pytest.raises(TypeError):
        attest.write_attestation(tmp_path, "parity", attest.statement(attest.PARITY, ID, {"a": object()}))
    found = attest.read_attestation(tmp_path, "parity", ID)
    assert found is not None
    assert found["predicate"] == {"a": 1}
    assert list((tmp_path / ".attest").iterdir()) == [path]


def test_numbers_that_json_cannot_carry_become_null(tmp_path: Path) -> None:
    values = {"kld_mean": math.nan, "kld_max": math.inf, "top1": 0.5}
    path = attest.write_attestation(tmp_path, "parity", attest.statement(attest.PARITY, ID, {"metrics": values}))
    assert json.loads(path.read_bytes())["predicate"]["metrics"] == {"kld_mean": None, "kld_max": None, "top1": 0.5}


def test_reading_refuses_another_artifacts_statement(tmp_path: Path) -> None:
    assert attest.read_attestation(tmp_path, "parity", ID) is None
    attest.write_attestation(tmp_path, "parity", attest.statement(attest.PARITY, OTHER, {}))
    with pytest.raises(VerificationError, match="another artifact"):
        attest.read_attestation(tmp_path, "parity", ID)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{}", b'{"_type":"https://in-toto.io/Statement/v1"}', b"[" * 10**5, b"\xff", b"null"],
)
def test_hostile_statements_are_refused(data: bytes) -> None:
    assert attest.statement_problem(data, ID)


@pytest.mark.parametrize("subject", [None, [], [None], [{}], [{"digest": "x"}], [{"digest": {"sha256": "2" * 64}}]])
def test_a_statement_without_our_subject_is_refused(subject: object) -> None:
    said = {**attest.statement(attest.PARITY, ID, {}), "subject": subject}
    assert attest.statement_problem(json.dumps(said).encode(), ID)
