"""Sign: an artifact's attestations, and one more that says that this is the artifact, each as a DSSE envelope."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime

from pipeline.artifact import dsse
from pipeline.artifact.attest import statement, statement_problem
from pipeline.artifact.dsse import Signature
from pipeline.artifact.manifest import Manifest
from pipeline.errors import VerificationError
from pipeline.trust.keys import PrivateKey

SIGNATURE = "urn:enginewright:signature:v1"
"""Predicate type of the statement that says no more than: this artifact is mine, until then."""
NAME = "signature.dsse"


def envelope(payload: bytes, key: PrivateKey) -> bytes:
    """A signed envelope over the exact bytes of a statement."""
    return dsse.encode(payload, [Signature(key.public.key_id, key.sign(dsse.signed_bytes(payload)))])


def sign(
    manifest: Manifest,
    artifact_id: str,
    files: Mapping[str, bytes],
    key: PrivateKey,
    *,
    expires: datetime | None = None,
) -> dict[str, bytes]:
    """The envelopes to add, by file name: one for each statement (`parity.json` -> `parity.dsse`), and signature.dsse.

    What this key has signed already is not signed again. VerificationError for a statement of another artifact.
    """
    made: dict[str, bytes] = {}
    for name, data in files.items():
        stem, _, suffix = name.rpartition(".")
        if suffix != "json":
            continue
        if problem := statement_problem(data, artifact_id):
            raise VerificationError(f"{name} {problem}", hint="delete it, or build again")
        if not _signed(files.get(f"{stem}.dsse"), data, key):
            made[f"{stem}.dsse"] = envelope(data, key)
    said = signature_statement(manifest, artifact_id, expires)
    if expires or not _valid_signature(files.get(NAME), key):
        made[NAME] = envelope(json.dumps(said, sort_keys=True).encode(), key)
    return made


def signature_statement(manifest: Manifest, artifact_id: str, expires: datetime | None) -> dict[str, object]:
    """What signature.dsse says."""
    predicate: dict[str, object] = {
        "name": manifest.name,
        "version": manifest.version,
        "target": manifest.target.name,
        "signed": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if expires:
        predicate["expires"] = expires.astimezone(UTC).isoformat(timespec="seconds")
    return statement(SIGNATURE, artifact_id, predicate, name=manifest.name)


def _signed(data: bytes | None, payload: bytes, key: PrivateKey) -> bool:
    """Whether an envelope holds exactly this payload under a good signature of the key."""
    with contextlib.suppress(ValueError):
        found = dsse.decode(data or b"")
        covered = dsse.signed_bytes(found.payload)
        return found.payload == payload and any(key.public.accepts(s.value, covered) for s in found.signatures)
    return False


def _valid_signature(data: bytes | None, key: PrivateKey) -> bool:
    """Whether there is a signature of this key that has no end."""
    with contextlib.suppress(ValueError):
        found = dsse.decode(data or b"")
        return _signed(data, found.payload, key) and "expires" not in json.loads(found.payload)["predicate"]
    return False
