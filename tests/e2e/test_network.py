"""A model on a hub (a stand-in on loopback), built through the installed command: pinned once, then without the hub."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import COPIES, MODEL, Site, refused, untouched, wait_for
from tests.hub import Fault, Hub, closed_port, serving

SMALL = ("config.json", "tokenizer_config.json", "generation_config.json")
WEIGHTS = bytes(range(256)) * 40_000
"""10 MB, of no use."""


def files(weights: bytes = WEIGHTS) -> dict[str, bytes]:
    """A repository."""
    return {name: (MODEL / name).read_bytes() for name in SMALL} | {"model.safetensors": weights}


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub with `org/tiny`."""
    for hub in serving():
        hub.commit("org/tiny", files())
        yield hub


@pytest.fixture
def site(hub: Hub, tmp_path: Path) -> Site:
    """A recipe that names it."""
    text = COPIES.partition("  two:")[0].replace("source: model", "source: hf://org/tiny@main")
    bare = Site.write(tmp_path / "site", text)
    env = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    return Site(bare.root, bare.cache, bare.out, env)


def test_pinned_once_then_without_the_hub(hub: Hub, site: Site, tmp_path: Path) -> None:
    before = site.made()
    first = hub.repos["org/tiny"].refs["main"]
    lock = json.loads((site.root / "recipe.lock").read_text())
    assert lock["model"]["revision"] == first
    asked = len(hub.requests)
    hub.commit("org/tiny", files(WEIGHTS[::-1]))
    for how in ((), ("--locked",), ("--offline",), ("--locked", "--offline")):
        assert site.made(*how) == before
    assert len(hub.requests) == asked
    # Another machine, with the lock: the same commit, though the branch has moved on.
    other = Site(site.root, tmp_path / "other", tmp_path / "other-out", site.env)
    assert other.made("--locked") == before
    assert site.made("--update") != before
    assert json.loads((site.root / "recipe.lock").read_text())["model"]["revision"] != first
    assert other.made("--locked") == site.ids()


def test_what_the_hub_refuses(hub: Hub, site: Site) -> None:
    site.made()
    hub.commit("org/tiny", files(WEIGHTS[::-1]))
    update = ("--update", "--quiet")
    with untouched(site):
        refused(site.build(*update, "--set", "model.source=hf://org/nothing"), 64, "no model hf://org/nothing")
        refused(site.build(*update, "--set", "model.source=hf://org/tiny@v9"), 64, "no revision 'v9'")
        hub.repos["org/tiny"].gated = True
        refused(site.build(*update), 7, "gated", "accept its licence", "HF_TOKEN")
        hub.repos["org/tiny"].gated = False
        nowhere = {"HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}"}
        refused(site.build(*update, env=nowhere), 7, "cannot be reached", "check the network")
        refused(site.build(*update, "--offline"), 7, "--offline")
        hub.faults["model.safetensors"] = Fault("bytes")
        refused(site.build(*update), 6, "model.safetensors", "sha256")
        assert not site.leftovers()
    del hub.faults["model.safetensors"]
    assert site.build("--quiet").code == 0


def test_a_broken_connection_is_resumed(hub: Hub, site: Site) -> None:
    hub.faults["model.safetensors"] = Fault("drop", value=4_000_000, times=1)
    site.made()
    ranges = [request.headers.get("Range") or request.headers.get("range") for request in hub.requests]
    assert any(each and each.startswith("bytes=") and each != "bytes=0-" for each in ranges)


def test_kill_9_in_a_download_then_only_the_rest_is_asked_for(hub: Hub, site: Site) -> None:
    hub.faults["model.safetensors"] = Fault("drop", value=6_000_000)
    build = site.start()
    wait_for(lambda: hub.asked("model.safetensors"), "the download begins")
    partial = wait_for(lambda: list((site.cache / "sources").glob("*.partial")), "a part is on the disk")
    wait_for(lambda: partial[0].stat().st_size > 1_000_000, "a part is on the disk")
    build.signal(signal.SIGKILL)
    build.end()
    hub.faults.clear()
    hub.requests.clear()
    assert set(site.made()) == {"one"}
    ranges = [value for request in hub.requests for name, value in request.headers.items() if name.lower() == "range"]
    assert any(int(each.removeprefix("bytes=").rstrip("-").split("-")[0]) > 1_000_000 for each in ranges)
    assert not site.leftovers()
