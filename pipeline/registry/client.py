"""HTTP to one registry: retries with the waits that it asks for, authentication, redirects, and errors in plain words.

TLS is checked against the system's authorities (`SSL_CERT_FILE` is honoured); plain HTTP goes to loopback only, unless
the caller allows it. Credentials never follow a redirect to another origin.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import random
import ssl
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from pipeline.errors import NetworkError, RecipeError
from pipeline.frozen import frozen
from pipeline.registry import auth
from pipeline.registry.origin import is_loopback, plain

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

CONNECT_S = 10.0
SILENCE_S = 60.0
"""How long a registry may stay silent in the middle of an answer."""
COMMIT_S = 600.0
"""How long it may take to store a blob that has arrived: some move gigabytes then."""
CONNECTIONS = 4
ATTEMPTS = 6
BACKOFF_S = 0.5
"""Wait after the first failure; it doubles, with jitter."""
WAIT_LIMIT_S = 60.0
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 5
MAX_REST = 1 << 16
AGAIN = "run the command again: what has arrived is not sent or fetched again"

Body = Callable[[], Iterator[bytes]]


@frozen
class Refused(Exception):  # noqa: N818  a status that the caller may know what to do with
    """The registry answered with a status that was not asked for."""

    status: int
    message: str
    retry_after: str = ""


class MisledError(NetworkError):
    """The registry sends to where nobody may follow: another attempt would end there, too."""


class Client:
    """Requests to the registry at `host`."""

    def __init__(self, host: str, *, scheme: str = "", plain_http: bool = False) -> None:
        self.host = host
        self.plain_http = plain_http
        self.scheme = scheme or ("http" if plain_http or is_loopback(host) else "https")
        self.base = f"{self.scheme}://{host}"
        self._authorization = ""
        self._answered = False
        self._pools: dict[tuple[str, str], PoolManager] = {}
        if self._in_the_clear(self.base):
            raise RecipeError(
                f"{host} would be spoken to in the clear, without TLS",
                hint="use its https address, or allow it with --plain-http",
            )

    def request(
        self,
        method: str,
        url: str,
        *,
        ok: Collection[int] = (200,),
        headers: Mapping[str, str] | None = None,
        body: bytes | Body | None = None,
        attempts: int = ATTEMPTS,
    ) -> BaseHTTPResponse:
        """Send until a status of `ok` comes back; the answer's body is not read yet.

        `url` may be a path. Raises Refused for another status, NetworkError when nothing answers.
        """
        failures = 0
        while True:
            try:
                return self._once(method, urljoin(self.base, url), ok, dict(headers or {}), body)
            except Refused as error:
                failures += 1
                if error.status not in TRANSIENT or failures >= attempts:
                    raise
                pause(failures, error.retry_after)
            except MisledError:
                raise
            except NetworkError:
                failures += 1
                # A registry that never answered is more likely misspelt than busy.
                if failures >= (attempts if self._answered else min(attempts, 2)):
                    raise
                pause(failures)

    def _once(
        self, method: str, url: str, ok: Collection[int], headers: dict[str, str], body: bytes | Body | None
    ) -> BaseHTTPResponse:
        """One attempt, redirects and authentication included."""
        authenticated = False
        hops = 0
        while True:
            self._check(url)
            own = urlsplit(url).netloc == self.host and urlsplit(url).scheme == self.scheme
            sent = {"User-Agent": "enginewright", "Accept-Encoding": "identity", **headers}
            if own and self._authorization:
                sent["Authorization"] = self._authorization
            answer = self._send(method, url, sent, body() if callable(body) else body)
            if answer.status in ok:
                return answer
            if answer.status in REDIRECTS and answer.headers.get("Location"):
                finish(answer)
                hops += 1
                if hops > MAX_REDIRECTS:
                    raise MisledError(f"{self.host} redirects without end", hint="check the registry's address")
                url = urljoin(url, answer.headers["Location"])
                continue
            if answer.status == 401 and own and not authenticated:
                challenges = answer.headers.get("WWW-Authenticate", "")
                finish(answer)
                authenticated = True
                self._authorization = auth.answer(challenges, self.host, self._token)
                if self._authorization:
                    continue
                raise Refused(401, "it wants credentials, and there are none")
            raise _refused(answer)

    def _token(self, url: str, headers: Mapping[str, str], form: bytes | None) -> bytes:
        """The answer of a token service."""
        self._check(url)
        failures = 0
        while True:
            answer = self._send("POST" if form else "GET", url, {"User-Agent": "enginewright", **headers}, form)
            if answer.status == 200:
                return answer.read(1 << 20)
            failures += 1
            error = _refused(answer)
            if answer.status not in TRANSIENT or failures >= ATTEMPTS:
                raise error
            pause(failures, error.retry_after)

    def _send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | Iterator[bytes] | None
    ) -> BaseHTTPResponse:
        import urllib3

        try:
            answer = self._pool(url).request(
                method,
                url,
                headers=dict(headers),
                body=body,
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
                timeout=urllib3.Timeout(connect=CONNECT_S, read=COMMIT_S if method == "PUT" else SILENCE_S),
            )
        except urllib3.exceptions.HTTPError as error:
            raise unreachable(self.host, error) from error
        self._answered = True
        return answer

    def _pool(self, url: str) -> PoolManager:
        """Connections to an origin, through the proxy that the environment names for it."""
        import urllib3

        scheme, host = urlsplit(url).scheme, urlsplit(url).hostname or ""
        proxy = urllib.request.getproxies_environment().get(scheme, "")
        if proxy and urllib.request.proxy_bypass(host):
            proxy = ""
        if (scheme, proxy) not in self._pools:
            # Reading the system's authorities takes longer than a request on loopback.
            pool: dict[str, Any] = {"maxsize": CONNECTIONS}
            if "https" in (scheme, proxy[:5]):
                pool["ssl_context"] = ssl.create_default_context()
            made = urllib3.ProxyManager(proxy, **pool) if proxy else urllib3.PoolManager(**pool)
            self._pools[scheme, proxy] = made
        return self._pools[scheme, proxy]

    def _in_the_clear(self, url: str) -> bool:
        """Whether others on the network could read along."""
        parts = urlsplit(url)
        return parts.scheme != "https" and not (self.plain_http or is_loopback(parts.netloc))

    def _check(self, url: str) -> None:
        """Refuse to follow the registry out of TLS, or to where no registry is."""
        if urlsplit(url).scheme not in ("http", "https"):
            raise MisledError(f"{self.host} sends to {plain(url)!r:.200}, which is no way to a registry")
        if self._in_the_clear(url):
            raise MisledError(
                f"{self.host} sends to {plain(url)!r:.200}, without TLS",
                hint="have the registry mended, or allow it with --plain-http",
            )


def finish(answer: BaseHTTPResponse) -> None:
    """Done with an answer: its line may be used again, unless there is more to come than anybody wants to read."""
    import urllib3

    with contextlib.suppress(urllib3.exceptions.HTTPError, OSError):
        answer.read(MAX_REST)
    answer.close()


def pause(failures: int, retry_after: str = "") -> None:
    """Wait before the next attempt: as long as the registry asks for, within bounds, else ever longer."""
    wait_s = BACKOFF_S * 2 ** (failures - 1) * random.uniform(0.5, 1.0)
    if retry_after.strip().isdecimal():
        wait_s = float(retry_after)
    elif retry_after and (parsed := email.utils.parsedate_tz(retry_after)):
        wait_s = email.utils.mktime_tz(parsed) - datetime.now(UTC).timestamp()
    time.sleep(min(max(wait_s, 0.0), WAIT_LIMIT_S))


def unreachable(host: str, error: Exception) -> NetworkError:
    """The error for a registry that cannot be spoken to."""
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, ssl.SSLError) or "SSL" in type(reason).__name__:
        return NetworkError(
            f"{host}: TLS failed: {plain(str(reason))}",
            hint="name the authority that signed its certificate with SSL_CERT_FILE; a registry without TLS needs "
            "--plain-http",
        )
    return NetworkError(f"{host} cannot be reached: {plain(str(reason))}", hint=f"check the address; then {AGAIN}")


def _refused(answer: BaseHTTPResponse) -> Refused:
    """The status, and what the registry says of it."""
    import urllib3

    try:
        data = answer.read(1 << 16)
        answer.release_conn()
    except urllib3.exceptions.HTTPError:
        data = b""
    message = ""
    try:
        errors = json.loads(data)["errors"]
        message = "; ".join(f"{each.get('code', '')}: {each.get('message', '')}" for each in errors[:3])
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        pass
    return Refused(answer.status, plain(message)[:500], answer.headers.get("Retry-After", ""))
