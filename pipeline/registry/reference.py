"""Where an artifact is: `host/repository:tag@digest`, `oci:FOLDER:tag`, `oci-archive:FILE.tar:tag`, `local:NAME:tag`.

`local:` is the registry beside the artifacts of this machine: an OCI layout a model.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pipeline.errors import RecipeError
from pipeline.frozen import frozen

Kind = Literal["registry", "layout", "archive", "local"]

TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_HOST = re.compile(r"(?:\[[0-9a-fA-F:]+\]|[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?)(?::\d{1,5})?")
_PREFIXES: dict[str, Kind] = {"oci:": "layout", "oci-archive:": "archive", "local:": "local"}
HINT = "for example registry.example.org/models/bert:1.0.0, oci:FOLDER:1.0.0, oci-archive:FILE.tar, local:bert:1.0.0"


@frozen
class Reference:
    """A place and what is meant there; `tag` and `digest` may be empty."""

    kind: Kind
    place: str
    """Host with port; folder; file; empty for `local`."""
    repository: str = ""
    tag: str = ""
    digest: str = ""
    scheme: str = ""
    """`http` or `https` where the reference says so."""

    @property
    def wanted(self) -> str:
        """What to ask for: the digest if there is one, else the tag, else `latest`."""
        return self.digest or self.tag or "latest"

    @property
    def name(self) -> str:
        """The place without tag and digest, as a person writes it."""
        if self.kind == "registry":
            return f"{self.place}/{self.repository}"
        prefix = next(text for text, kind in _PREFIXES.items() if kind == self.kind)
        return f"{prefix}{self.place or self.repository}"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.name}{tag}{f'@{self.digest}' if self.digest else ''}"

    def at(self, tag: str = "", digest: str = "") -> Reference:
        """The same place with another tag or digest."""
        return replace(self, tag=tag, digest=digest)


def parse(text: str) -> Reference:
    """A reference from its text. RecipeError for what is none."""
    for prefix, kind in _PREFIXES.items():
        if text.startswith(prefix):
            return _local(text, text.removeprefix(prefix), kind)
    scheme = ""
    if "://" in text:
        scheme = urlsplit(text).scheme
        if scheme not in ("http", "https"):
            raise RecipeError(f"{text!r} is not a reference: {scheme}:// is no way to a registry", hint=HINT)
        text = text.partition("://")[2]
    host, slash, rest = text.partition("/")
    # A host has a dot or a port, or is this machine: `org/model` is a name of some hub, not a place.
    named = "." in host or ":" in host or host == "localhost" or scheme
    if not slash or not named or not _HOST.fullmatch(host):
        raise RecipeError(f"{text!r} is not a reference: it names no registry", hint=HINT)
    path, tag, digest = _tagged(rest, text)
    if not _REPOSITORY.fullmatch(path) or len(path) > 255:
        raise RecipeError(
            f"{text!r} is not a reference: a repository is lower-case letters and digits, "
            "joined by single `.`, `_`, `-` or `/`",
            hint=HINT,
        )
    return Reference("registry", host, path, tag, digest, scheme)


def is_reference(text: str) -> bool:
    """Whether a text that may also be a folder is meant as a reference: a folder that exists is none."""
    if text.startswith(tuple(_PREFIXES)) or "://" in text:
        return True
    host = text.partition("/")[0]
    named = (":" in host or "." in host.strip(".") or host == "localhost") and "/" in text
    return bool(named and host.strip(".") and not Path(text).exists() and _HOST.fullmatch(host))


def version_tag(version: str) -> str:
    """The tag of a version: `+`, which no tag may hold, becomes `_`. RecipeError when there is no such tag."""
    tag = version.replace("+", "_")
    if not TAG.fullmatch(tag):
        raise RecipeError(f"{version!r} cannot be a tag", hint="give one in the reference: REPOSITORY:TAG")
    return tag


def _local(text: str, rest: str, kind: Kind) -> Reference:
    path, tag, digest = _tagged(rest, text)
    if not path:
        raise RecipeError(f"{text!r} is not a reference: it names no place", hint=HINT)
    if kind == "local":
        if not _REPOSITORY.fullmatch(path) or "/" in path:
            raise RecipeError(f"{text!r} is not a reference: {path!r} is no name of a model", hint=HINT)
        return Reference(kind, "", path, tag, digest)
    return Reference(kind, path, "", tag, digest)


def _tagged(rest: str, text: str) -> tuple[str, str, str]:
    """Path, tag, digest."""
    rest, at, digest = rest.partition("@")
    if at and not DIGEST.fullmatch(digest):
        raise RecipeError(f"{text!r} is not a reference: {digest!r:.80} is not sha256:<64 hex digits>", hint=HINT)
    head, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:
        return rest, "", digest
    if not TAG.fullmatch(tag):
        raise RecipeError(f"{text!r} is not a reference: {tag!r:.140} is not a tag", hint=HINT)
    return head, tag, digest
