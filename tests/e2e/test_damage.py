"""A gate that cannot pass, and results that were cut, changed or deleted behind the store's back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.harness import Site, command, refused, untouched


@pytest.mark.parametrize("gate", ["cpu-int4.gates.kld_mean=0", "cpu-fp32.gates.top1=1.5"])
def test_an_impossible_gate_publishes_nothing(ready: Site, tmp_path: Path, gate: str) -> None:
    target, _, rest = gate.partition(".gates.")
    metric, _, threshold = rest.partition("=")
    before = ready.ids()
    with untouched(ready):
        done = ready.build("--set", f"targets.{gate}")
        refused(done, 4, "1 of 3 targets failed", "nothing was published", f"{target}: {metric}", threshold, "worst")
        # The engine is there for whoever wants to look into it.
        assert any(Path(line.removeprefix("hint: ")).is_dir() for line in done.err.splitlines())
    assert ready.ids() == before
    assert command("enginewright", "verify", ready.out / "small" / target).code == 0
    fresh = Site(ready.root, ready.cache, tmp_path / "out")
    refused(fresh.build("--set", f"targets.{gate}"), 4)
    assert not fresh.out.exists()


def test_a_gate_switched_off_is_said_in_the_manifest(ready: Site, tmp_path: Path) -> None:
    site = Site(ready.root, ready.cache, tmp_path / "out")
    done = site.build("--set", "targets.cpu-int4.gates.kld_mean=null", "--format", "json", "--target", "cpu-int4")
    assert done.code == 0, done.err
    (each,) = done.json["targets"]
    assert {gate["outcome"] for gate in each["gates"] if gate["metric"] == "kld_mean"} == {"off"}
    assert '"kld_mean":null' in (site.out / "small" / "cpu-int4" / "manifest.json").read_text()
    assert site.ids() != {"cpu-int4": ready.ids()["cpu-int4"]}


def _write(path: Path, data: bytes) -> None:
    """New bytes in the same file, with its modification time as it was."""
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(entry: Path) -> None:
    largest = max((entry / "out").iterdir(), key=lambda path: path.stat().st_size)
    _write(largest, largest.read_bytes()[:-1])


def one_byte(entry: Path) -> None:
    largest = max((entry / "out").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    _write(largest, bytes(data))


def one_file(entry: Path) -> None:
    next((entry / "out").iterdir()).unlink()


def one_more(entry: Path) -> None:
    (entry / "out" / "stray.json").write_text("{}")


def emptied(entry: Path) -> None:
    shutil.rmtree(entry / "out")


def record(entry: Path) -> None:
    (entry / "entry.json").write_text('{"files": [')


def no_record(entry: Path) -> None:
    (entry / "entry.json").unlink()


def a_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("")


def deleted(entry: Path) -> None:
    shutil.rmtree(entry)


@pytest.mark.parametrize(
    "damage", [cut, one_byte, one_file, one_more, emptied, record, no_record, a_file, deleted], ids=lambda f: f.__name__
)
def test_a_damaged_result_is_noticed_and_built_again(
    copies: Site, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    site = copies.elsewhere(tmp_path / "site")
    before = site.made()
    (model,) = site.entries("fetch")
    damage(model)
    plan = site.plan()
    assert set(plan) == {"model"}
    assert plan["model"] == "its result was removed" if damage is deleted else plan["model"] != "not built yet"
    done = site.build()
    assert done.code == 0, done.err
    assert ("corrupt" in done.err) == (damage is not deleted)
    assert "model: done" in done.err
    assert site.ids() == before
    assert site.plan() == {}
    assert not site.leftovers()


@pytest.mark.parametrize("stage", ["reference", "onnx.fused", "onnxruntime.weights", "onnxruntime.parity", "golden"])
def test_a_byte_changed_in_any_stage_is_never_used(ready: Site, tmp_path: Path, stage: str) -> None:
    """Every result of the stage, and every artifact with it: most of its files are links to the store."""
    site = ready.elsewhere(tmp_path / "site")
    before = site.made()
    for entry in site.entries(stage):
        one_byte(entry)
    assert len(site.plan()) == len(site.entries(stage))
    assert site.made() == before
    assert site.ids() == before
    assert command("enginewright", "cache", "verify", "--cache", site.cache).code == 0


def test_a_damaged_artifact_is_built_again_from_the_store(ready: Site, tmp_path: Path) -> None:
    site = ready.elsewhere(tmp_path / "site")
    before = site.made("--copy")
    artifact = site.out / "small" / "cpu-int8"
    weights = max(artifact.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    _write(weights, bytes(data))
    refused(command("enginewright", "verify", artifact), 6, f"{weights.name}: has other contents")
    assert site.ran("--copy") == []
    assert site.ids() == before


def test_an_artifact_edited_in_place_does_not_poison_the_store(ready: Site, tmp_path: Path) -> None:
    site = ready.elsewhere(tmp_path / "site")
    before = site.made()
    config = site.out / "small" / "cpu-int8" / "config.json"
    _write(config, config.read_bytes().replace(b"llama", b"LLAMA"))
    refused(command("enginewright", "verify", config.parent), 6, "config.json")
    assert site.made() == before
    assert site.ids() == before
    assert command("enginewright", "cache", "verify", "--cache", site.cache).code == 0


def test_cache_verify_finds_what_changed_and_removes_it_on_demand(copies: Site, tmp_path: Path) -> None:
    site = copies.elsewhere(tmp_path / "site")
    one_byte(site.entries("fetch")[0])
    verify = ("enginewright", "cache", "verify", "--cache", site.cache)
    refused(command(*verify), 6, "--remove")
    done = command(*verify, "--remove")
    assert (done.code, "corrupt: fetch-" in done.out) == (0, True)
    assert command(*verify).code == 0
    assert site.plan() == {"model": "its result was removed"}
    assert command("enginewright", "cache", "gc", "--cache", site.cache).code == 0
    assert len(site.plan()) == 3
    assert site.made() == copies.ids()
