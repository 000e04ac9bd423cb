"""The hub's client: huggingface_hub, only its public parts, imported only when the network is needed."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any


def library(module: str = "") -> Any:
    """huggingface_hub or a module of it. It reads these variables on import: no telemetry, no second host for bytes."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    return importlib.import_module(f"huggingface_hub.{module}" if module else "huggingface_hub")


def http_package() -> Any:
    """The HTTP client's package, which has another name since huggingface_hub 2."""
    return importlib.import_module(library("errors").HTTPError.__module__.partition(".")[0])


def endpoint() -> str:
    """The hub's address."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or str(library("constants").ENDPOINT)


def timeout_s() -> float:
    """How long the hub may stay silent."""
    return float(library("constants").HF_HUB_DOWNLOAD_TIMEOUT)


def cached(repo: str, commit: str, path: str) -> Path | None:
    """The file in huggingface_hub's own cache, where other tools may have left it."""
    found = library().try_to_load_from_cache(repo, path, revision=commit)
    return Path(found) if isinstance(found, str) else None
