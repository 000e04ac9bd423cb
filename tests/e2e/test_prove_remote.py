"""Built anywhere, proved where it runs: a deferred version in a registry becomes one that may be promoted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.artifact import attest
from tests.e2e.harness import Site, command, refused
from tests.registry import server
from tests.registry.server import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A registry of its own."""
    with server.running(tmp_path / "registry") as found:
        yield found


def test_a_proof_reaches_the_registry_signed(ready: Site, registry: Registry, tmp_path: Path) -> None:
    made = tmp_path / "small" / "cpu-int8"
    shutil.copytree(ready.out / "small" / "cpu-int8", made)
    parity = made / ".attest" / "parity.json"
    said = json.loads(parity.read_text())
    said["predicate"] |= {"verdict": "deferred", "result": "WARNED", "passedTests": [], "metrics": {}}
    parity.write_text(json.dumps(said))
    assert command("enginewright", "keygen", tmp_path / "key").code == 0
    (tmp_path / "policy.yaml").write_text("require: [parity, benchmark]\nkeys: [key.pub]\n")
    ref, goal = f"{registry.address}/small:1.0.0", f"{registry.address}/production:1.0.0"
    policy = ("--policy", tmp_path / "policy.yaml")
    assert command("enginewright", "push", made, ref).code == 0
    refused(command("enginewright", "promote", ref, goal), 4, "cpu-int8: deferred (parity.json)")
    refused(command("enginewright", "verify", ref, *policy), 6, "parity.dsse is missing", "benchmark.dsse is missing")
    run = ("verify", "--run", "--attest", ref, "--out", tmp_path / "artifacts")
    refused(command("enginewright", *run), 64, "no key to sign with")
    done = command("enginewright", *run, "--sign-key", tmp_path / "key.key", "--format", "json")
    assert done.code == 0, done.err
    assert done.json["parity"]["verdict"] == "passed"
    done = command("enginewright", "promote", ref, goal, *policy, "--format", "json")
    assert done.code == 0, done.err
    assert done.json["targets"] == [{"target": "cpu-int8", "parity": "passed"}]
    found = command("enginewright", "inspect", goal, "--format", "json").json
    assert found["attestations"]["parity"]["predicate"]["inputs"] == "golden"
    took = found["attestations"]["benchmark"]
    assert took["predicateType"] == attest.BENCHMARK
    assert took["predicate"]["metrics"]["runs"] >= 1 and took["predicate"]["metrics"]["open_s"] > 0
    # Whoever pulls it has the proof beside it; the local build's own is kept.
    done = command("enginewright", "pull", goal, *policy, "--out", tmp_path / "pulled")
    assert done.code == 0, done.err
    names = {path.name for path in (tmp_path / "pulled/small/cpu-int8/.attest").iterdir()}
    assert {"parity.json", "parity.dsse", "parity.2.json", "benchmark.json", "sbom.json", "provenance.json"} <= names
