"""DSSE envelopes: an in-toto Statement with signatures over its exact bytes. Reading only; see trust/ for keys.

https://github.com/secure-systems-lab/dsse, version 1.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.artifact.attest import statement_problem
from pipeline.digest import canonical

PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_SIGNATURES = 16


class Signature(NamedTuple):
    """A signature and the name of the key that made it, which is a hint and proves nothing."""

    key_id: str
    value: bytes


class Envelope(NamedTuple):
    """What was signed, and by whom it claims to be."""

    payload: bytes
    signatures: tuple[Signature, ...]


def signed_bytes(payload: bytes, payload_type: str = PAYLOAD_TYPE) -> bytes:
    """The bytes that a signature covers (PAE): type and content, each with its length."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def encode(payload: bytes, signatures: Sequence[Signature]) -> bytes:
    """An envelope's bytes."""
    return canonical(
        {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"keyid": s.key_id, "sig": base64.b64encode(s.value).decode()} for s in signatures],
        }
    )


def decode(data: bytes) -> Envelope:
    """An envelope from its bytes. Raises ValueError for what is none."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(value, dict) or value.get("payloadType") != PAYLOAD_TYPE:
        raise ValueError("is not a DSSE envelope of an in-toto Statement")
    signatures = value.get("signatures")
    if not isinstance(signatures, list) or not 1 <= len(signatures) <= MAX_SIGNATURES:
        raise ValueError(f"has no signature, or more than {MAX_SIGNATURES}")
    try:
        made = tuple(Signature(str(each.get("keyid", "")), _bytes(each["sig"])) for each in signatures)
        return Envelope(_bytes(value["payload"]), made)
    except (KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise ValueError(f"is damaged: {error}") from None


def statement(data: bytes) -> dict[str, Any]:
    """The statement in an envelope that has no `problem`."""
    found: dict[str, Any] = json.loads(decode(data).payload)
    return found


def problem(data: bytes, artifact_id: str) -> str | None:
    """Why these bytes are not an envelope that speaks of the artifact, or None. No signature is looked at."""
    try:
        envelope = decode(data)
    except ValueError as error:
        return str(error) if not isinstance(error, json.JSONDecodeError) else "is not JSON"
    return statement_problem(envelope.payload, artifact_id)


def _bytes(text: Any) -> bytes:
    """Base64, standard or URL-safe, as the specification allows."""
    return base64.b64decode(str(text).translate(str.maketrans("-_", "+/")), validate=True)
