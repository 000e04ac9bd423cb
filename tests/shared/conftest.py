"""The places of shared stores: a folder, a bucket of a local S3 server, a repository of a local registry."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.registry import server
from tests.registry.server import Registry
from tests.shared import s3
from tests.shared.s3 import S3

_numbers = itertools.count()


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """One server for all tests; each has a prefix of its own."""
    with s3.running(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with server.running(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture
def s3_url(bucket: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix that nobody else has, with the environment that its builders need."""
    for name, value in bucket.env.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3.BUCKET}/{next(_numbers)}"


@pytest.fixture(params=["file", "s3", "oci"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A shared store of each kind."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_url"))
    if request.param == "oci":
        registry = request.getfixturevalue("registry")
        return f"oci://{registry.address}/store/{next(_numbers)}"
    (tmp_path / "shared").mkdir()
    return (tmp_path / "shared").as_uri()
