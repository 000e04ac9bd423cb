"""Builds that many tests look at, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.e2e.harness import ALL_TARGETS, COPIES, Done, Site, command


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Site]:
    """The first build of recipes/tiny-llama.yaml: what it said, and where it is."""
    place = tmp_path_factory.mktemp("shipped")
    site = Site(ROOT, place / "cache", place / "out")
    argv = site.argv("--locked", "--format", "json", "--junit", place / "gates.xml", "--events", place / "events")
    done = command("build", "recipes/tiny-llama.yaml", *argv[2:])
    assert done.code == 0, done.err
    return done, site


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Site]:
    """The first build of recipes/minilm.yaml."""
    place = tmp_path_factory.mktemp("sentences")
    site = Site(ROOT, place / "cache", place / "out")
    done = command("build", "recipes/minilm.yaml", *site.argv("--locked", "--format", "json")[2:])
    assert done.code == 0, done.err
    return done, site


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A small recipe with three targets of ONNX Runtime, built and published. Tests leave it as it is."""
    site = Site.write(tmp_path_factory.mktemp("ready"), ALL_TARGETS)
    site.made()
    return site


@pytest.fixture(scope="session")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The same with two targets that only copy. Tests leave it as it is."""
    site = Site.write(tmp_path_factory.mktemp("copies"), COPIES)
    site.made()
    return site


@pytest.fixture(scope="session")
def spoiled(ready: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A copy of `ready` for builds that fail: its artifacts stay as they are, its store may get more results."""
    site = ready.elsewhere(tmp_path_factory.mktemp("spoiled") / "site")
    assert site.made() == ready.ids()
    return site


@pytest.fixture
def bad(spoiled: Site, tmp_path: Path) -> Site:
    """A site whose input a test spoils; its artifacts and its store are those of `spoiled`."""
    return Site.write(tmp_path / "site", cache=spoiled.cache, out=spoiled.out)
