"""A repository of a registry, by the OCI distribution protocol 1.1 (and by its tag schema where 1.1 is not spoken)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlencode, urljoin

from pipeline.errors import EnginewrightError, NetworkError, VerificationError
from pipeline.registry import media
from pipeline.registry.answers import (
    TAMPERED,
    explained,
    listed,
    next_page,
    object_of,
    read,
    starts_at,
    with_digest,
)
from pipeline.registry.client import (
    AGAIN,
    ATTEMPTS,
    CONNECTIONS,
    TRANSIENT,
    Client,
    MisledError,
    Refused,
    finish,
    pause,
    unreachable,
)
from pipeline.registry.credentials import HUB, HUB_NAMES
from pipeline.registry.fallback import keep_tag, listed_as, referrers_tag, with_referrers
from pipeline.registry.media import Descriptor
from pipeline.registry.origin import plain
from pipeline.registry.reference import DIGEST, TAG, Reference
from pipeline.registry.repository import BLOCK, Advance, Repository, Source, quiet

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

ACCEPT = ", ".join((media.INDEX, media.MANIFEST, *media.DOCKER))
MAX_LIST = 16 * 2**20
MAX_PAGES = 10_000


class Remote:
    """A repository that is spoken to over HTTP."""

    workers = CONNECTIONS

    def __init__(self, reference: Reference, *, plain_http: bool = False, client: Client | None = None) -> None:
        self.reference = reference
        host = HUB if reference.place in HUB_NAMES else reference.place
        self.client = client or Client(host, scheme=reference.scheme, plain_http=plain_http)
        self.base = f"/v2/{reference.repository}"
        self._damaged: set[str] = set()
        """Blobs of another size than was announced. Some registries keep them, whatever is sent."""

    def manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        with explained(self.reference, f"{self.reference.name}:{reference}"):
            answer = self.client.request("GET", f"{self.base}/manifests/{reference}", headers={"Accept": ACCEPT})
            data = read(self.reference, answer, media.MAX_MANIFEST, reference)
        found = media.described("", data)
        told = answer.headers.get("Docker-Content-Digest", found.digest)
        if DIGEST.fullmatch(reference) and found.digest != reference:
            raise VerificationError(
                f"{self.reference.name}: asked for {reference}, the registry gave {found.digest}", hint=TAMPERED
            )
        if told != found.digest:
            raise VerificationError(
                f"{self.reference.name}: the registry says that {reference} is {plain(told)[:80]}, "
                f"and its bytes are {found.digest}",
                hint=TAMPERED,
            )
        kind = media.kind_of(media.document(data, f"{self.reference.name}:{reference}"))
        return Descriptor(kind, found.digest, len(data)), data

    def has_manifest(self, reference: str) -> str:
        with explained(self.reference, f"{self.reference.name}:{reference}"):
            try:
                answer = self.client.request("HEAD", f"{self.base}/manifests/{reference}", headers={"Accept": ACCEPT})
            except Refused as error:
                if error.status in (404, 400):
                    return ""
                raise
            finish(answer)
        told = answer.headers.get("Docker-Content-Digest", "")
        return told if DIGEST.fullmatch(told) else self.manifest(reference)[0].digest

    def put_manifest(self, data: bytes, media_type: str, tag: str = "") -> Descriptor:
        made, _ = self._put(data, media_type, tag)
        return made

    def _put(self, data: bytes, media_type: str, tag: str) -> tuple[Descriptor, bool]:
        """Also whether the registry keeps the list of referrers by itself."""
        made = media.described(media_type, data)
        if len(data) > media.MAX_MANIFEST:
            raise NetworkError(f"the manifest has {len(data)} bytes, and registries take {media.MAX_MANIFEST}")
        with explained(self.reference, f"{self.reference.name}:{tag or made.digest}"):
            answer = self._send_manifest(data, media_type, tag or made.digest)
            finish(answer)
        self._stored(answer.headers.get("Docker-Content-Digest", made.digest), made.digest)
        return made, "OCI-Subject" in answer.headers

    def _send_manifest(self, data: bytes, media_type: str, reference: str) -> BaseHTTPResponse:
        """PUT. What was stored a moment ago may not be seen yet, where others write or storage is slow: wait for it."""
        failures = 0
        while True:
            try:
                return self.client.request(
                    "PUT",
                    f"{self.base}/manifests/{reference}",
                    ok=(200, 201, 202),
                    headers={"Content-Type": media_type},
                    body=data,
                )
            except Refused as error:
                failures += 1
                if "UNKNOWN" not in error.message or failures >= ATTEMPTS:
                    raise
                pause(failures)

    def has_blob(self, blob: Descriptor) -> bool:
        with explained(self.reference, f"{self.reference.name}@{blob.digest}"):
            try:
                answer = self.client.request("HEAD", f"{self.base}/blobs/{blob.digest}")
            except Refused as error:
                if error.status in (404, 400):
                    return False
                raise
            finish(answer)
        whole = answer.headers.get("Content-Length", str(blob.size)) == str(blob.size)
        if not whole:
            self._damaged.add(blob.digest)
        return whole

    @contextlib.contextmanager
    def read_blob(self, blob: Descriptor, offset: int = 0) -> Iterator[tuple[int, Iterator[bytes]]]:
        import urllib3

        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with explained(self.reference, f"{self.reference.name}@{blob.digest}"):
            try:
                answer = self.client.request("GET", f"{self.base}/blobs/{blob.digest}", ok=(200, 206), headers=headers)
            except Refused as error:
                if error.status != 416 or not offset:
                    raise
                answer = self.client.request("GET", f"{self.base}/blobs/{blob.digest}")
        start = offset if answer.status == 206 and starts_at(answer.headers, offset) else 0
        if answer.status == 206 and not start and offset:
            answer.close()
            raise NetworkError(f"{self.reference.place} answered another part of {blob.digest} than was asked for")

        def blocks() -> Iterator[bytes]:
            try:
                yield from answer.stream(BLOCK, decode_content=False)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise unreachable(self.reference.place, error) from error

        try:
            yield start, blocks()
        finally:
            answer.close()  # what was not read of an answer must not be taken for the next one's start

    def write_blob(self, blob: Descriptor, source: Source, advance: Advance = quiet) -> None:
        """One request with the whole blob: every registry takes it, and nothing is held in memory."""
        failures, sent = 0, 0

        def body(stream: Iterator[bytes]) -> Iterator[bytes]:
            nonlocal sent
            for block in stream:
                sent += len(block)
                advance(len(block))
                yield block

        while True:
            sent = 0
            try:
                with (
                    explained(self.reference, f"{self.reference.name}@{blob.digest}"),
                    contextlib.ExitStack() as opened,
                ):
                    place = self._session()
                    answer = self.client.request(
                        "PUT",
                        with_digest(place, blob.digest),
                        ok=(201, 204),
                        headers={"Content-Type": "application/octet-stream", "Content-Length": str(blob.size)},
                        body=lambda: body(opened.enter_context(source())),
                        attempts=1,
                    )
                    finish(answer)
                self._stored(answer.headers.get("Docker-Content-Digest", blob.digest), blob.digest)
                if blob.digest in self._damaged and not self.has_blob(blob):
                    raise VerificationError(
                        f"{self.reference.place} keeps a blob of another size under {blob.digest}",
                        hint="its storage is damaged: have the blob removed there, then push again",
                    )
                return
            except NetworkError as error:
                advance(-sent)
                failures += 1
                cause = error.__cause__
                status = cause.status if isinstance(cause, Refused) else 0
                # A session that broke off is gone with what it held (404, 416): the next attempt has its own.
                final = isinstance(error, MisledError) or (status and status not in TRANSIENT | {404, 416})
                if final or failures >= ATTEMPTS:
                    raise
                pause(failures, cause.retry_after if isinstance(cause, Refused) else "")
                with contextlib.suppress(EnginewrightError):
                    if self.has_blob(blob):  # it was stored, and only the answer was lost
                        advance(blob.size)
                        return

    def mount(self, blob: Descriptor, origin: Repository) -> bool:
        if not isinstance(origin, Remote) or origin.client.base != self.client.base:
            return False
        query = urlencode({"mount": blob.digest, "from": origin.reference.repository})
        with explained(self.reference, self.reference.name):
            answer = self.client.request("POST", f"{self.base}/blobs/uploads/?{query}", ok=(201, 202), body=b"")
            finish(answer)
            if answer.status == 202 and (place := answer.headers.get("Location")):
                # The registry would have the bytes after all, and has opened a session that nobody will use.
                with contextlib.suppress(Refused, EnginewrightError):
                    finish(self.client.request("DELETE", urljoin(self.client.base, place), ok=(202, 204), attempts=1))
        return answer.status == 201

    def tags(self) -> list[str]:
        found: set[str] = set()
        with explained(self.reference, self.reference.name):
            for data in self._pages(f"{self.base}/tags/list?n=1000", "its tags"):
                said = object_of(data, f"the tags of {self.reference.name}")
                found.update(tag for tag in said.get("tags") or () if isinstance(tag, str) and TAG.fullmatch(tag))
        return sorted(found)

    def referrers(self, digest: str) -> list[Descriptor]:
        with explained(self.reference, self.reference.name):
            try:
                pages = list(self._pages(f"{self.base}/referrers/{digest}", f"the referrers of {digest}"))
                return [each for data in pages for each in listed(data, digest)]
            except Refused as error:
                # What registries say that know no such path.
                if error.status not in (400, 403, 404, 405, 406):
                    raise
        tag = referrers_tag(digest)
        return listed(self.manifest(tag)[1], digest) if self.has_manifest(tag) else []

    def _pages(self, url: str, what: str) -> Iterator[bytes]:
        """The pages of a list."""
        for _ in range(MAX_PAGES):
            answer = self.client.request("GET", url, headers={"Accept": f"{media.INDEX}, application/json"})
            yield read(self.reference, answer, MAX_LIST, what)
            following = next_page(answer.headers.get("Link", ""))
            if not following:
                return
            url = urljoin(urljoin(self.client.base, url), following)
        raise NetworkError(f"{self.reference.name}: {what} have no end", hint="is it a registry?")

    def attach(self, manifests: Sequence[bytes], subject: str) -> None:
        unlisted = []
        for data in manifests:
            entry = listed_as(data)
            _, native = self._put(data, media.MANIFEST, keep_tag(subject, entry.digest))
            if not native:
                unlisted.append(entry)
        if unlisted:
            self._list(unlisted, subject)

    def _list(self, entries: Sequence[Descriptor], subject: str) -> None:
        """Add to the list that stands under the tag. Another writer may be at it: read again what came of it."""
        tag, wanted = referrers_tag(subject), {each.digest for each in entries}
        for attempt in range(1, ATTEMPTS + 1):
            before = self.manifest(tag)[1] if self.has_manifest(tag) else b""
            after = with_referrers(before, entries, subject)
            if after != before:
                self.put_manifest(after, media.INDEX, tag)
            if wanted <= {each.digest for each in listed(self.manifest(tag)[1], subject)}:
                return
            pause(attempt)
        raise NetworkError(f"{self.reference.name}: others write the list {tag} at the same time", hint=AGAIN)

    def _session(self) -> str:
        """Where to put a blob."""
        answer = self.client.request("POST", f"{self.base}/blobs/uploads/", ok=(202,), body=b"")
        finish(answer)
        place = answer.headers.get("Location")
        if not place:
            raise NetworkError(f"{self.reference.place} names no place for an upload", hint="is it a registry?")
        return urljoin(f"{self.client.base}{self.base}/blobs/uploads/", place)

    def _stored(self, told: str, meant: str) -> None:
        if told != meant:
            raise VerificationError(
                f"{self.reference.name}: the registry stored {plain(told)[:80]} where {meant} was sent", hint=TAMPERED
            )
