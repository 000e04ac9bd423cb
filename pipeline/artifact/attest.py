"""Attestations: what varies from run to run, as in-toto Statements beside the manifest in `.attest/`.

They are not listed in the manifest and not part of the artifact's identity; each names the artifact_id it speaks of.
`provenance.json` is SLSA v1, `parity.json` is in-toto test-result v0.1 with the numbers added. Times are RFC 3339, UTC.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.artifact import paths
from pipeline.artifact.manifest import ManifestFacts, freeze
from pipeline.artifact.place import sync_names
from pipeline.errors import VerificationError
from pipeline.frozen import frozen

STATEMENT = "https://in-toto.io/Statement/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
PARITY = "https://in-toto.io/attestation/test-result/v0.1"
BENCHMARK = "urn:enginewright:benchmark:v1"
BUILD_TYPE = "urn:enginewright:build:v1"
BUILDER = "urn:enginewright:builder"

Verdict = Literal["passed", "failed", "deferred"]


class Attestation(NamedTuple):
    """A predicate with its type, not yet bound to an artifact."""

    predicate_type: str
    predicate: Mapping[str, Any]


def statement(predicate_type: str, artifact_id: str, predicate: Mapping[str, Any], *, name: str = "") -> dict[str, Any]:
    """An in-toto Statement that says `predicate` of the artifact."""
    algorithm, _, value = artifact_id.partition(":")
    subject: dict[str, Any] = {"digest": {algorithm: value}}
    if name:
        subject = {"name": name, **subject}
    return {"_type": STATEMENT, "subject": [subject], "predicateType": predicate_type, "predicate": dict(predicate)}


def write_attestation(artifact: Path, name: str, statement: Mapping[str, Any]) -> Path:
    """Write `.attest/<name>.json`, whole or not at all; a number that is not finite becomes null. Raises OSError."""
    text = json.dumps(_finite(statement), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return write_file(artifact, f"{name}.json", f"{text}\n".encode())


def write_file(artifact: Path, name: str, data: bytes) -> Path:
    """Write `.attest/<name>`, whole or not at all. Raises OSError."""
    folder = artifact / paths.ATTESTATIONS
    folder.mkdir(exist_ok=True)
    path = folder / name
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_names(folder)
    return path


def _finite(value: Any) -> Any:
    """A JSON value in which NaN and infinities, which JSON cannot carry, are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def read_attestation(artifact: Path, name: str, artifact_id: str) -> dict[str, Any] | None:
    """The statement `.attest/<name>.json`, or None when there is none.

    Raises VerificationError when it is not an in-toto Statement, or speaks of another artifact.
    """
    path = artifact / paths.ATTESTATIONS / f"{name}.json"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if problem := statement_problem(data, artifact_id):
        raise VerificationError(
            f"{path} {problem}", hint="delete it, then build again or run `enginewright verify --run`"
        )
    found: dict[str, Any] = json.loads(data)
    return found


def statement_problem(data: bytes, artifact_id: str) -> str | None:
    """Why these bytes are not a statement about the artifact, or None."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return "is not JSON"
    if not isinstance(found, dict) or found.get("_type") != STATEMENT or not isinstance(found.get("predicate"), dict):
        return "is not an in-toto Statement"
    algorithm, _, value = artifact_id.partition(":")
    subjects = found.get("subject")
    digests = [item.get("digest") for item in subjects if isinstance(item, dict)] if isinstance(subjects, list) else []
    if not any(isinstance(digest, dict) and digest.get(algorithm) == value for digest in digests):
        return f"speaks of another artifact than {artifact_id}"
    return None


@frozen(kw_only=True)
class StepRun:
    """What one step cost in this build. A cache hit tells what it cost when it ran."""

    name: str
    key: str
    cached: bool
    wall_s: float | None = None
    cpu_s: float | None = None
    peak_rss_bytes: int | None = None
    output_bytes: int | None = None


def provenance(
    facts: ManifestFacts,
    *,
    started: str,
    finished: str,
    steps: Sequence[StepRun] = (),
    host: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    invocation: str = "",
) -> Attestation:
    """SLSA v1 provenance: the recipe, the sources, and how this run went. `started` and `finished` are RFC 3339."""
    metadata = {"startedOn": started, "finishedOn": finished}
    if invocation:
        metadata["invocationId"] = invocation
    predicate = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {"recipe": freeze(facts.recipe), "target": facts.target.name},
            "internalParameters": {"build_key": facts.build_key, "host": dict(host or {})},
            "resolvedDependencies": [
                {
                    "name": source.name,
                    "uri": source.uri,
                    **({"digest": {"gitCommit": source.revision}} if source.revision else {}),
                    "annotations": {file.path: file.digest for file in source.files},
                }
                for source in facts.sources
            ],
        },
        "runDetails": {
            "builder": {"id": BUILDER, "version": dict(versions or {})},
            "metadata": metadata,
            "byproducts": [
                {"name": step.name, "uri": f"urn:enginewright:step:{step.key}", "annotations": asdict(step)}
                for step in steps
            ],
        },
    }
    return Attestation(PROVENANCE, predicate)


@frozen(kw_only=True)
class ParityResult:
    """How an engine compared with the fp32 reference, or why that is not known yet."""

    verdict: Verdict
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """None where it was not a finite number."""
    passed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    """Names of the gates' metrics."""
    skipped: tuple[str, ...] = ()
    """Gates that these inputs cannot judge."""
    reason: str = ""
    """Why it was deferred, or what failed."""
    samples: int = 0
    inputs: Literal["held-out", "golden"] = "held-out"
    """Judged on the recipe's parity data, or on the few golden inputs that travel with the artifact."""
    worst: Mapping[str, Any] = field(default_factory=dict)
    host: Mapping[str, Any] = field(default_factory=dict)


def parity(result: ParityResult, thresholds: Mapping[str, str | None], build_key: str) -> Attestation:
    """The test-result predicate. `thresholds` are the manifest's gates.

    test-result knows PASSED, WARNED and FAILED. What was deferred did not run, so it is WARNED with no passed test and
    every gate among the warned ones: a policy that asks for PASSED refuses it, as it should.
    """
    words = {"passed": "PASSED", "failed": "FAILED", "deferred": "WARNED"}
    unjudged = [name for name, limit in thresholds.items() if limit is not None]
    predicate = {
        "result": words[result.verdict],
        "configuration": [{"name": "gates", "uri": f"urn:enginewright:build-key:{build_key}"}],
        "passedTests": sorted(result.passed),
        "warnedTests": sorted(unjudged if result.verdict == "deferred" else result.skipped),
        "failedTests": sorted(result.failed),
        "verdict": result.verdict,
        "reason": result.reason,
        "metrics": dict(result.metrics),
        "thresholds": dict(thresholds),
        "samples": result.samples,
        "inputs": result.inputs,
        "worst": dict(result.worst),
        "host": dict(result.host),
    }
    return Attestation(PARITY, predicate)


def judged(predicate: Mapping[str, Any]) -> bool:
    """Whether it holds a verdict on something that ran."""
    return predicate.get("verdict") in ("passed", "failed")


def benchmark(timing: Mapping[str, float], host: Mapping[str, Any]) -> Attestation:
    """What the golden inputs took on a machine, in seconds. They are few: it is a hint, no comparison of engines."""
    return Attestation(BENCHMARK, {"metrics": dict(timing), "inputs": "golden", "host": dict(host)})
