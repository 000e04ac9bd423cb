"""The policy: what must be attested, by which keys, under which licences. What it does not allow is refused.

```yaml
require: [signature, provenance, parity]   # also: sbom, benchmark
keys: [release.pub]                        # files relative to the policy; a signature of any of them counts
licenses: [Apache-2.0, MIT]                # optional: every licence of the artifact must be among these
```
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from pipeline.artifact import attest, dsse
from pipeline.artifact.manifest import Manifest
from pipeline.errors import RecipeError, VerificationError
from pipeline.frozen import frozen
from pipeline.trust import licenses as spdx
from pipeline.trust.keys import PublicKey, public_key
from pipeline.trust.sbom import CYCLONEDX
from pipeline.trust.sign import SIGNATURE

TYPES = {
    "signature": SIGNATURE,
    "provenance": attest.PROVENANCE,
    "parity": attest.PARITY,
    "sbom": CYCLONEDX,
    "benchmark": attest.BENCHMARK,
}
MAX_BYTES = 1 << 20


@frozen
class Policy:
    """What is enough."""

    require: tuple[str, ...]
    keys: tuple[PublicKey, ...]
    licenses: tuple[str, ...] | None = None


@frozen
class Finding:
    """One demand of the policy, and whether it is met."""

    demand: str
    ok: bool
    reason: str


class _Strict(yaml.SafeLoader):
    """YAML in which a name that stands twice is an error: the second would silently win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if not isinstance(name, str):
                raise ValueError(f"{name!r:.80} is no field")
            if names.count(name) > 1:
                raise ValueError(f"{name!r:.80} stands twice")
        return super().construct_mapping(node, deep=deep)


def of_keys(paths: Sequence[Path]) -> Policy:
    """The policy that `--key` means: signed by one of these."""
    return Policy(("signature",), tuple(public_key(path) for path in paths))


def load(path: Path, more_keys: Sequence[Path] = ()) -> Policy:
    """A policy from its file, all errors at once. RecipeError for anything that is not understood."""
    try:
        with path.open("rb") as stream:
            value = yaml.load(stream.read(MAX_BYTES), _Strict)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}", hint="give the file of a policy") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not a policy: {error}", hint=HINT) from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path} is not a policy: it has no fields", hint=HINT)
    problems = [f"unknown field {name!r:.80}" for name in value if name not in ("require", "keys", "licenses")]
    lists: dict[str, tuple[str, ...]] = {}
    for name in ("require", "keys", "licenses"):
        found = value.get(name, [])
        if not isinstance(found, list) or not all(isinstance(each, str) and each for each in found):
            problems.append(f"{name} is not a list of texts")
        elif name in value and not found:
            problems.append(f"{name} is empty")
        else:
            lists[name] = tuple(found)
    problems += [f"require: {each!r:.80} is not known" for each in lists.get("require", ()) if each not in TYPES]
    if not value.get("require"):
        problems.append("require is missing: a policy that demands nothing protects nothing")
    if not value.get("keys") and not more_keys:
        problems.append("keys is missing: anybody can sign with a key of their own")
    if problems:
        raise RecipeError(f"{path} is not a policy:" + "".join(f"\n  {each}" for each in problems), hint=HINT)
    files = [*(path.parent / each for each in lists["keys"]), *more_keys]
    return Policy(
        lists["require"], tuple(public_key(each) for each in files), lists["licenses"] if "licenses" in value else None
    )


HINT = f"a policy has `require:` (of {', '.join(TYPES)}), `keys:` (files) and perhaps `licenses:`"


def judge(policy: Policy, manifest: Manifest, artifact_id: str, files: Mapping[str, bytes]) -> list[Finding]:
    """Every demand of the policy on an artifact; `files` are its attestations by file name.

    Only signed statements count, and of their signatures only those of the policy's keys.
    """
    trusted, notes = _trusted(policy, artifact_id, files)
    found = []
    for demand in policy.require:
        said = [(name, value) for name, value in trusted if value.get("predicateType") == TYPES[demand]]
        if not said:
            why = "; ".join(notes.get(TYPES[demand], [])) or f".attest/{demand}.dsse is missing"
            found.append(Finding(demand, False, why))
            continue
        verdicts = [(name, _objection(demand, value["predicate"])) for name, value in said]
        failed = [f"{name} {objection}" for name, objection in verdicts if objection]
        good = [name for name, objection in verdicts if not objection]
        # Any failed proof counts against it, wherever another one passed.
        fatal = [f"{name} says that it failed" for name, value in said if _failed(demand, value["predicate"])]
        if good and not fatal:
            found.append(Finding(demand, True, good[0]))
        else:
            found.append(Finding(demand, False, "; ".join(fatal or failed)))
    if policy.licenses is not None:
        found.append(_licenses(policy.licenses, manifest.licenses))
    return found


def require(
    policy: Policy, manifest: Manifest, artifact_id: str, files: Mapping[str, bytes], what: str
) -> list[Finding]:
    """The findings, all of them good. Raises VerificationError with every demand that is not met."""
    found = judge(policy, manifest, artifact_id, files)
    if wrong := [each for each in found if not each.ok]:
        raise VerificationError(
            f"{what} does not meet the policy:" + "".join(f"\n  {each.demand}: {each.reason}" for each in wrong),
            hint="do not use it; whoever publishes it must sign it (`enginewright sign`), "
            "or prove it (`enginewright verify --run --attest`)",
        )
    return found


def _trusted(
    policy: Policy, artifact_id: str, files: Mapping[str, bytes]
) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, list[str]]]:
    """Statements with a good signature of an allowed key; and by predicate type why others do not count."""
    good: list[tuple[str, dict[str, Any]]] = []
    notes: dict[str, list[str]] = {}
    for name, data in files.items():
        if not name.endswith(".dsse"):
            continue
        if problem := dsse.problem(data, artifact_id):
            raise VerificationError(
                f".attest/{name} {problem}", hint="do not use it: it was altered, or belongs elsewhere"
            )
        envelope = dsse.decode(data)
        value: dict[str, Any] = json.loads(envelope.payload)
        covered = dsse.signed_bytes(envelope.payload)
        if any(key.accepts(s.value, covered) for key in policy.keys for s in envelope.signatures):
            good.append((name, value))
            continue
        claimed = ", ".join(s.key_id[:12] or "unnamed" for s in envelope.signatures)
        allowed = any(s.key_id == key.key_id for key in policy.keys for s in envelope.signatures)
        told = "its signature is wrong" if allowed else f"signed by {claimed}, which the policy does not allow"
        notes.setdefault(str(value.get("predicateType")), []).append(f".attest/{name}: {told}")
    return good, notes


def _objection(demand: str, predicate: Mapping[str, Any]) -> str:
    """Why a trusted statement is not enough; empty if it is."""
    if demand == "parity" and predicate.get("result") != "PASSED":
        return f"says {predicate.get('verdict') or predicate.get('result')!s:.40}, not passed"
    if demand == "signature" and "expires" in predicate:
        try:
            until = datetime.fromisoformat(str(predicate["expires"]))
            if until.tzinfo is None or until <= datetime.now(UTC):
                return f"expired at {until.isoformat()}"
        except ValueError:
            return f"has no readable end: {predicate['expires']!r:.40}"
    return ""


def _failed(demand: str, predicate: Mapping[str, Any]) -> bool:
    return demand == "parity" and predicate.get("result") == "FAILED"


def _licenses(allowed: Sequence[str], stated: Sequence[str]) -> Finding:
    if not stated:
        return Finding("licenses", False, "manifest.json states none")
    wrong = [each for each in stated if not spdx.allowed(each, allowed)]
    if wrong:
        return Finding("licenses", False, f"{', '.join(wrong)} is not among {', '.join(allowed)}")
    return Finding("licenses", True, ", ".join(stated))
