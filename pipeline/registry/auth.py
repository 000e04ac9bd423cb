"""Who we are to a registry: its challenge in, an Authorization header out. Basic and bearer (the token protocol)."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from urllib.parse import urlencode, urlsplit, urlunsplit

from pipeline.errors import NetworkError
from pipeline.registry.credentials import Credentials, find

Ask = Callable[[str, Mapping[str, str], bytes | None], bytes]
"""(url, headers, form) -> the body of the answer."""


def challenges(header: str) -> dict[str, dict[str, str]]:
    """Scheme (lower-case) -> parameters of a WWW-Authenticate header."""
    found: dict[str, dict[str, str]] = {}
    current = ""
    for word in re.finditer(r'([A-Za-z_-]+)\s*=\s*(?:"([^"]*)"|([^\s,]+))|([A-Za-z]+)(?=\s|$)', header):
        name, quoted, bare, scheme = word.groups()
        if scheme:
            current = scheme.lower()
            found[current] = {}
        elif current:
            found[current][name.lower()] = quoted if quoted is not None else bare
    return found


def answer(header: str, host: str, ask: Ask) -> str:
    """The value for Authorization, or "" when there is nothing to answer with."""
    found = challenges(header)
    credentials = find(host)
    if "bearer" in found:
        return _bearer(found["bearer"], host, credentials, ask)
    if "basic" in found and credentials and credentials.user:
        return _basic(credentials)
    return ""


def _basic(credentials: Credentials) -> str:
    pair = f"{credentials.user}:{credentials.secret}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


def _bearer(challenge: Mapping[str, str], host: str, credentials: Credentials | None, ask: Ask) -> str:
    """A token of the service that the challenge names; anonymous where there are no credentials."""
    if credentials and credentials.is_token and not challenge.get("realm"):
        return f"Bearer {credentials.secret}"
    realm = challenge.get("realm", "")
    if urlsplit(realm).scheme not in ("http", "https"):
        raise NetworkError(f"{host} names no token service", hint="check the registry's address")
    query = {name: challenge[name] for name in ("service", "scope") if challenge.get(name)}
    headers: dict[str, str] = {}
    form = None
    if credentials and credentials.is_token:
        asked = {"grant_type": "refresh_token", "refresh_token": credentials.secret, "client_id": "enginewright"}
        form = urlencode({**asked, **query}).encode()
        headers["Content-Type"] = "application/x-www-form-urlencoded"
    elif credentials:
        headers["Authorization"] = _basic(credentials)
    url = realm if form else _with_query(realm, query)
    try:
        said = json.loads(ask(url, headers, form))
        token = said.get("token") or said.get("access_token")
    except (ValueError, AttributeError, RecursionError):
        token = None
    if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
        raise NetworkError(f"the token service of {host} gave no token", hint="check the credentials of this registry")
    return f"Bearer {token}"


def _with_query(url: str, query: Mapping[str, str]) -> str:
    parts = urlsplit(url)
    joined = "&".join(filter(None, (parts.query, urlencode({**query, "client_id": "enginewright"}))))
    return urlunsplit((parts.scheme, parts.netloc, parts.path, joined, ""))
