"""What a registry answers: bodies within bounds, lists and their pages, and statuses in a user's words."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from pipeline.errors import NetworkError, VerificationError
from pipeline.registry import media
from pipeline.registry.client import AGAIN, TRANSIENT, Refused, unreachable
from pipeline.registry.media import Descriptor
from pipeline.registry.reference import Reference

TAMPERED = "do not use it: the registry's storage is damaged, or something in between alters what it sends"


@contextlib.contextmanager
def explained(reference: Reference, what: str) -> Iterator[None]:
    """A status in a user's words."""
    try:
        yield
    except Refused as error:
        said = f" ({error.message})" if error.message else ""
        if error.status == 401:
            raise NetworkError(
                f"{reference.place} does not know you: {what}: 401{said}",
                hint="log in with `docker login`, `podman login` or `skopeo login`, or set ENGINEWRIGHT_REGISTRY, "
                "ENGINEWRIGHT_REGISTRY_USER and ENGINEWRIGHT_REGISTRY_PASSWORD",
            ) from error
        if error.status == 403:
            raise NetworkError(
                f"{reference.place} does not let you do that: {what}: 403{said}",
                hint="ask for the right, or log in as somebody who has it",
            ) from error
        if error.status == 404:
            raise NetworkError(
                f"{what} is not there{said}", hint=f"`enginewright ls {reference.name}` shows what is"
            ) from error
        raise NetworkError(
            f"{reference.place} answered {error.status}: {what}{said}",
            hint=AGAIN if error.status in TRANSIENT else "check the address, and the registry's log",
        ) from error


def read(reference: Reference, answer: Any, limit: int, what: str) -> bytes:
    """A body of at most `limit` bytes."""
    import urllib3

    try:
        data: bytes = answer.read(limit + 1, decode_content=False)
        while len(data) <= limit and (more := answer.read(limit + 1 - len(data), decode_content=False)):
            data += more
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise unreachable(reference.place, error) from error
    finally:
        answer.release_conn()
    if len(data) > limit:
        answer.close()
        raise VerificationError(f"{reference.name}: {what} has more than {limit} bytes", hint=TAMPERED)
    return data


def with_digest(place: str, digest: str) -> str:
    """Where an upload ends: its place, with the digest in the query."""
    return f"{place}{'&' if '?' in place else '?'}digest={quote(digest)}"


def starts_at(headers: Any, offset: int) -> bool:
    """Whether a part begins where it was asked for."""
    told = headers.get("Content-Range", "")
    return not told or told.removeprefix("bytes ").startswith(f"{offset}-")


def next_page(link: str) -> str:
    """The URL of the next page in a Link header."""
    for part in link.split(","):
        url, _, relation = part.strip().partition(">")
        if 'rel="next"' in relation and url.startswith("<"):
            return url[1:]
    return ""


def object_of(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object, or NetworkError."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise NetworkError(f"{what} are not what a registry says", hint="check the address")
    return value


def listed(data: bytes, digest: str) -> list[Descriptor]:
    """The entries of a list of referrers."""
    value = media.document(data, f"the referrers of {digest}")
    return [media.descriptor(each, f"the referrers of {digest}") for each in value.get("manifests", ())]
