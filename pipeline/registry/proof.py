"""Whether every target of a version was proved: what `promote` asks before it lets a version pass."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pipeline.artifact import attest, dsse
from pipeline.errors import GateError
from pipeline.frozen import frozen
from pipeline.registry import attestations
from pipeline.registry.version import Version


@frozen
class Parity:
    """What a target's parity attestations say together: `passed`, `failed`, `deferred`, or `missing`."""

    target: str
    verdict: str
    source: str
    """The file that says so."""


def parity(target: str, files: Mapping[str, bytes]) -> Parity:
    """The verdict of a target's attestations. One that failed outweighs any that passed; deferred is not passed."""
    verdicts: dict[str, str] = {}
    for name, data in files.items():
        value = dsse.statement(data) if name.endswith(".dsse") else json.loads(data)
        if value.get("predicateType") == attest.PARITY:
            words = {"PASSED": "passed", "FAILED": "failed"}
            verdicts.setdefault(words.get(str(value["predicate"].get("result")), "deferred"), name)
    for verdict in ("failed", "passed", "deferred"):
        if verdict in verdicts:
            return Parity(target, verdict, verdicts[verdict])
    return Parity(target, "missing", "")


def require(version: Version, said: Mapping[str, Mapping[str, bytes]], *, allow_deferred: bool) -> list[Parity]:
    """The verdict on every target; `said` is target -> its attestations.

    GateError unless each passed; `allow_deferred` lets those through that did not run, never those that failed.
    """
    found = [parity(name, files) for name, files in said.items()]
    allowed = ("passed", "deferred", "missing") if allow_deferred else ("passed",)
    if wrong := [each for each in found if each.verdict not in allowed]:
        told = "".join(
            f"\n  {each.target}: {each.verdict}" + (f" ({each.source})" if each.source else "") for each in wrong
        )
        raise GateError(
            f"{version.repository.reference.name} is not proved on every target:{told}",
            hint="run `enginewright verify --run --attest REF --target NAME` on a machine that the target is for"
            + ("" if any(each.verdict == "failed" for each in wrong) else ", or promote with --allow-deferred"),
        )
    return found


def said_of(version: Version) -> dict[str, dict[str, bytes]]:
    """Target -> file name -> bytes of its attestations."""
    return {
        each.manifest.target.name: attestations.fetch(version.repository, each.descriptor.digest, each.artifact_id)
        for each in version.targets
    }
