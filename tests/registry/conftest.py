"""A registry for the session, a proxy before it, and artifacts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.registry import client
from tests.registry import door, server
from tests.registry.proxy import Proxy
from tests.registry.server import Registry

_numbers = itertools.count()


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """One for all tests; each has a repository of its own."""
    with server.running(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture
def own_registry(tmp_path: Path) -> Iterator[Registry]:
    """One whose storage a test may damage."""
    with server.running(tmp_path / "registry") as found:
        yield found


@pytest.fixture
def proxy(registry: Registry) -> Iterator[Proxy]:
    """A proxy before it."""
    with Proxy(registry.address) as found:
        yield found


@pytest.fixture
def repository() -> str:
    """A name that no other test uses."""
    return f"models/test{next(_numbers)}"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """artifacts/tiny with two targets. Tests leave it as it is."""
    return door.artifacts(tmp_path_factory.mktemp("made"))


@pytest.fixture(autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials of the user, no proxy, and short waits."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path_factory.getbasetemp() / "no-docker"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)
