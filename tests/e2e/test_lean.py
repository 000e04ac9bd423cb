"""`build --lean` leaves the artifacts and little beside them; whatever is built next is what it would have been."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.run.lean import SMALL, thin
from pipeline.store import Store
from tests.e2e.harness import Site, command

GROUP = ("--set", "targets.cpu-int4.quantize.group_size=64")


def disk(*folders: Path) -> int:
    """Bytes of all files, each counted once, whatever its names."""
    found = {}
    for folder in folders:
        found |= {(s.st_dev, s.st_ino): s.st_size for p in folder.rglob("*") if p.is_file() and (s := p.stat())}
    return sum(found.values())


def test_what_is_left_is_the_artifacts(ready: Site, tmp_path: Path) -> None:
    site = ready.elsewhere(tmp_path / "site")
    ids = site.made()
    assert disk(site.cache, site.out) > 1.3 * disk(site.out)
    done = site.build("--lean")
    assert done.code == 0 and "note: --lean dropped" in done.err, done.err
    assert disk(site.cache, site.out) < 1.1 * disk(site.out)
    assert site.ids() == ids == ready.ids()


def test_the_same_build_has_nothing_to_do(ready: Site, tmp_path: Path) -> None:
    site = ready.elsewhere(tmp_path / "site")
    ids = site.made("--lean")
    assert site.plan() == {} and site.ran() == [] and site.ran("--lean") == []
    assert site.ids() == ids
    verified = command("enginewright", "cache", "verify", "--cache", site.cache)
    assert verified.code == 0, verified.err
    listed = json.loads(command("enginewright", "cache", "ls", "--cache", site.cache, "--format", "json").out)
    thinned = [each for each in listed["results"] if each["state"] == "ok, without its large files"]
    assert thinned and all(each["size_bytes"] <= 8 * SMALL for each in thinned)


def test_another_build_makes_again_what_it_reads(ready: Site, tmp_path: Path) -> None:
    site = ready.elsewhere(tmp_path / "site")
    site.made("--lean")
    expected = ready.elsewhere(tmp_path / "whole").made(*GROUP)
    plan = site.plan(*GROUP)
    assert plan["cpu-int4/engine"] == "options.group_size 32 -> 64"
    dropped = {step for step, reason in plan.items() if reason.endswith("what `build --lean` dropped of its result")}
    assert {"model", "reference"} <= dropped and not any("golden" in step or "cpu-int8" in step for step in plan)
    assert set(site.ran(*GROUP)) == set(plan)
    assert site.ids() == expected
    assert site.ran() == [] and site.ids() == ready.ids()


def test_what_was_dropped_can_become_an_artifact(ready: Site, tmp_path: Path) -> None:
    site = Site.write(tmp_path / "site")
    one = site.made("--target", "cpu-int8", "--lean")
    assert one == {"cpu-int8": ready.ids()["cpu-int8"]}
    assert site.made() == ready.ids() == site.ids()


def test_a_drop_that_was_killed_is_taken_up(ready: Site, tmp_path: Path) -> None:
    site = ready.elsewhere(tmp_path / "site")
    site.made("--lean")
    (reference,) = site.entries("reference")
    record = json.loads((reference / "entry.json").read_text())
    (large, *_) = [file["path"] for file in record["files"] if file.get("dropped")]
    (reference / "out" / large).write_bytes(b"left by a process that was killed")
    assert site.ran() == []
    assert any(step.endswith("reference") for step in site.ran(*GROUP))  # never taken for what it was
    assert command("enginewright", "cache", "verify", "--cache", site.cache).code == 0


def test_what_a_build_uses_stays(ready: Site, tmp_path: Path) -> None:
    site = ready.elsewhere(tmp_path / "site")
    (reference,) = site.entries("reference")
    store, key = Store(site.cache), reference.name
    with store.using([key]):
        assert thin(Store(site.cache), key) == 0
        assert (entry := store.get(key)) and entry.whole
    assert thin(Store(site.cache), key) > 0
    assert store.get(key) is None and (entry := store.get(key, thin=True)) and not entry.whole
    assert thin(Store(site.cache), key) == 0
