"""Credentials of a registry: from the environment, or from the file and the helpers that docker, podman and skopeo use.

Never from the command line, where every process of the machine could read them.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from dataclasses import field
from pathlib import Path
from typing import Any

from pipeline.errors import NetworkError, RecipeError
from pipeline.frozen import frozen

HELPER_S = 30
HUB = "registry-1.docker.io"
HUB_NAMES = ("index.docker.io", "docker.io")
"""What Docker Hub is called, and by what `docker login` knows it."""


@frozen
class Credentials:
    """A user and a password, or an identity token."""

    user: str
    secret: str = field(repr=False)
    is_token: bool = False


def find(host: str) -> Credentials | None:
    """What this user has for a registry; None: anonymous. RecipeError for a damaged file."""
    user, secret = os.environ.get("ENGINEWRIGHT_REGISTRY_USER"), os.environ.get("ENGINEWRIGHT_REGISTRY_PASSWORD")
    if user and secret and os.environ.get("ENGINEWRIGHT_REGISTRY") == host:  # no other host may see them
        return Credentials(user, secret)
    for path in _files():
        if path.is_file():
            return _from_file(path, host)
    return None


def _files() -> list[Path]:
    """Where the file may be; the first that is there counts."""
    if folder := os.environ.get("DOCKER_CONFIG"):
        return [Path(folder) / "config.json"]
    found = [Path(named)] if (named := os.environ.get("REGISTRY_AUTH_FILE")) else []
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        found.append(Path(runtime) / "containers" / "auth.json")
    try:
        return [*found, Path.home() / ".docker" / "config.json"]
    except RuntimeError:  # a container with a bare user number
        return found


def _from_file(path: Path, host: str) -> Credentials | None:
    try:
        config = json.loads(path.read_bytes())
        helpers, auths = config.get("credHelpers") or {}, config.get("auths") or {}
        helper = helpers.get(host) or config.get("credsStore")
        hosts = (host, *HUB_NAMES) if host == HUB else (host,)
        names = [name for name in auths if _host(name) in hosts]
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}", hint="log in again, or set DOCKER_CONFIG") from None
    if helper and (found := _from_helper(str(helper), names[0] if names else host)):
        return found
    for name in names:
        entry = auths[name] if isinstance(auths[name], dict) else {}
        if token := entry.get("identitytoken"):
            return Credentials("", str(token), is_token=True)
        if entry.get("auth"):
            try:
                user, _, secret = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
            except ValueError:
                raise RecipeError(f"{path}: the entry of {host} is damaged", hint="log in again") from None
            return Credentials(user, secret)
        if entry.get("username"):
            return Credentials(str(entry["username"]), str(entry.get("password", "")))
    return None


def _host(name: str) -> str:
    """The host of an entry: docker writes `https://host/v1/` for some."""
    return re.sub(r"^https?://", "", name).partition("/")[0]


def _from_helper(helper: str, host: str) -> Credentials | None:
    """What `docker-credential-<helper> get` says; None when it knows nothing of the host."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", helper):
        raise RecipeError(f"{helper!r} is no name of a credential helper", hint="mend docker's config.json")
    program = shutil.which(f"docker-credential-{helper}")
    if program is None:
        raise NetworkError(
            f"the credential helper docker-credential-{helper} is not installed",
            hint="install it, or remove it from docker's config.json",
        )
    try:
        done = subprocess.run(
            [program, "get"], input=host, capture_output=True, text=True, timeout=HELPER_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NetworkError(f"the credential helper docker-credential-{helper} failed: {error}") from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip()
        if "not found" in said:
            return None
        raise NetworkError(
            f"the credential helper docker-credential-{helper} failed: {said[:200]}", hint="log in again"
        )
    try:
        found: Any = json.loads(done.stdout)
        user, secret = str(found["Username"]), str(found["Secret"])
    except (ValueError, LookupError, TypeError):
        raise NetworkError(f"the credential helper docker-credential-{helper} gave no credentials") from None
    return Credentials("", secret, is_token=True) if user == "<token>" else Credentials(user, secret)
