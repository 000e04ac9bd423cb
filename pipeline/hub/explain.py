"""The hub's errors in a user's words: each with its exit code and what to do."""

from __future__ import annotations

import time

from pipeline.errors import EnginewrightError, NetworkError, RecipeError
from pipeline.hub.client import endpoint, http_package, library, timeout_s

ATTEMPTS = 5
"""How often in a row a request may fail, or a download bring nothing."""
BACKOFF_S = 1.0
"""Wait after the first failure. It doubles, up to BACKOFF_LIMIT_S."""
BACKOFF_LIMIT_S = 30.0
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


def wait_or_raise(error: Exception, failures: int, repo: str, revision: str | None, path: str = "") -> None:
    """Wait before the next attempt, or raise what a user can understand. `failures` counts those in a row."""
    http = http_package()
    response = getattr(error, "response", None)
    transient = isinstance(error, http.TransportError | NetworkError) or _status(error) in TRANSIENT
    # At planning nobody shall wait long to hear that there is no network; a download of hours shall survive a gap.
    if transient and failures < (2 if isinstance(error, http.ConnectError) and not path else ATTEMPTS):
        asked = response.headers.get("Retry-After", "") if response is not None else ""
        wait_s = max(BACKOFF_S * 2 ** (failures - 1), float(asked) if asked.isdecimal() else 0.0)
        time.sleep(min(wait_s, BACKOFF_LIMIT_S))
        return
    explained = explain(error, repo, revision, path)
    if explained is None:
        raise error
    raise explained from error


def explain(error: Exception, repo: str, revision: str | None, path: str = "") -> EnginewrightError | None:
    """What the client's error means; None for a bug or a local error. `path`: a file of a pinned commit was asked."""
    errors, http = library("errors"), http_package()
    what, where, status = f"hf://{repo}", endpoint(), _status(error)
    asked = f"{path} of {what}" if path else what
    if isinstance(error, EnginewrightError):
        return error
    if isinstance(error, errors.GatedRepoError):
        return NetworkError(
            f"{what} is gated: its owner has not let you in ({status})",
            hint=f"accept its licence at {where}/{repo}, then set HF_TOKEN to a token of that account",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        if path:
            return NetworkError(f"{what} is not on {where} any more, or has become private", hint=TOKEN)
        return RecipeError(f"there is no model {what} on {where}", hint=f"check the name; if it is private, {TOKEN}")
    if isinstance(error, errors.RevisionNotFoundError):
        if path:
            return NetworkError(f"{what} has lost its commit {revision}", hint=UPDATE)
        return RecipeError(f"{what} has no revision {revision!r}", hint="after the @ stands a branch, tag or commit")
    if isinstance(error, errors.EntryNotFoundError):
        return NetworkError(f"{what} at {revision} has no {path} any more", hint=UPDATE)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return NetworkError(f"{asked} is needed, and HF_HUB_OFFLINE is set", hint="unset HF_HUB_OFFLINE")
    if isinstance(error, errors.HFValidationError):
        return RecipeError(f"{what}: {error}", hint="write `hf://org/name` or `hf://org/name@revision`")
    if status == 401:
        return NetworkError(f"{where} did not accept HF_TOKEN for {what} (401)", hint="make a new token, or unset it")
    if status == 403:
        return NetworkError(f"{where} does not let you read {what} (403)", hint=TOKEN)
    if status == 429:
        return NetworkError(f"{where} answers that there were too many requests (429)", hint="wait, or set HF_TOKEN")
    if status:
        return NetworkError(f"{where} answered {status}, asked for {asked}", hint="try again later")
    if isinstance(error, http.TimeoutException):
        return NetworkError(
            f"{where} did not answer within {timeout_s():g} s, asked for {asked}",
            hint="try again, or raise HF_HUB_DOWNLOAD_TIMEOUT (seconds)",
        )
    if isinstance(error, http.ConnectError | http.UnsupportedProtocol):
        return NetworkError(
            f"{where} cannot be reached: {error}",
            hint="check the network, HTTPS_PROXY and HF_ENDPOINT; if the model is on this disk, give its folder",
        )
    if isinstance(error, http.TransportError):
        return NetworkError(f"the connection to {where} broke, asked for {asked}: {error}", hint=RESUMES)
    if not path and isinstance(error, ValueError | TypeError | AttributeError | LookupError):
        return NetworkError(
            f"{where} does not answer like a Hugging Face hub: {error}",
            hint="check HF_ENDPOINT, and whether a login page stands in between",
        )
    return None


TOKEN = "set HF_TOKEN to a token that may read it"
UPDATE = "pin another commit: run the command with --update"
RESUMES = "run the command again: it goes on where it stopped"


def _status(error: Exception) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0))
