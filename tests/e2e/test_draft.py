"""`enginewright draft`: the engines of a build without its proof; nothing takes them for artifacts."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.engine import Sampling
from pipeline.targets.ort_engine import open_engine
from tests.e2e.harness import COPIES, Done, Running, Site, command, mounted, refused, size_of, snapshot, wait_for
from tests.e2e.test_lean import disk


def draft(site: Site, *more: object) -> Done:
    """`enginewright draft recipe.yaml` to its end; drafts lie in `site.out`."""
    return command("enginewright", "draft", *site.argv(*more)[1:], cwd=site.root)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A recipe that costs nothing."""
    return Site.write(tmp_path / "site", COPIES)


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """ONNX Runtime in three precisions, drafted from an empty store."""
    made = Site.write(tmp_path_factory.mktemp("drafted"))
    done = draft(made, "--events", made.root / "events")
    assert done.code == 0, done.err
    assert "nothing is proved" in done.err
    return made


def test_the_engines_are_those_of_a_build(drafted: Site, ready: Site) -> None:
    for target in ("cpu-fp32", "cpu-int8", "cpu-int4"):
        place = drafted.out / "small" / target
        files = {path.name: path.read_bytes() for path in place.iterdir()}
        said = json.loads(files.pop("draft.json"))
        assert said["proved"] is False and said["target"] == target and said["runtime"] == "onnxruntime"
        artifact = ready.out / "small" / target
        assert files and all((artifact / name).read_bytes() == data for name, data in files.items())
        tokens = list(open_engine(place).generate([[5, 6, 7]], Sampling(max_new_tokens=4)))
        assert len(tokens) == 4


def test_nothing_that_proves_has_run(drafted: Site) -> None:
    events = [json.loads(line) for line in (drafted.root / "events").read_text().splitlines()]
    ran = {event["step"].rpartition("/")[2] for event in events if event["event"] == "done"}
    assert ran == {"model", "export", "engine"}
    assert {path.name.partition("-")[0] for path in (drafted.cache / "results").iterdir()}.isdisjoint(
        {"reference", "golden", "onnxruntime.parity"}
    )


def test_a_build_proves_the_same_engines_and_makes_none_again(drafted: Site, ready: Site, tmp_path: Path) -> None:
    site = drafted.elsewhere(tmp_path / "site")
    ran = site.ran()
    assert "reference" in ran and not any(step.endswith(("engine", "export")) for step in ran)
    assert site.ids() == ready.ids()


def test_engines_that_are_there_need_no_room_again(drafted: Site, ready: Site, tmp_path: Path) -> None:
    """The estimate is of what will run: the proof is small."""
    weights = (drafted.root / "model" / "model.safetensors").stat().st_size
    with mounted(tmp_path / "small", size_of(drafted.cache) + weights) as place:
        shutil.copytree(drafted.cache, place / "cache")
        site = replace(drafted, cache=place / "cache", out=tmp_path / "out")
        assert site.made() == ready.ids()


def test_a_second_draft_has_nothing_to_do(site: Site) -> None:
    assert draft(site).code == 0
    before = snapshot(site.out)
    done = draft(site, "--format", "json")
    assert done.code == 0 and done.err == "" and snapshot(site.out) == before
    assert done.json["proved"] is False
    assert [(each["target"], Path(each["path"])) for each in done.json["targets"]] == [
        (target, site.out / "small" / target) for target in ("one", "two")
    ]


def test_another_draft_takes_the_place_of_the_first(site: Site) -> None:
    assert draft(site, "--copy").code == 0
    first = (site.out / "small" / "one" / "engine.json").read_bytes()
    site.edit("    runtime: copy\n", "    runtime: copy\n    note: changed\n")
    assert draft(site, "--copy").code == 0
    assert (site.out / "small" / "one" / "engine.json").read_bytes() != first
    (site.out / "small" / "two" / "config.json").unlink()
    assert draft(site).code == 0 and (site.out / "small" / "two" / "config.json").is_file()
    assert not site.leftovers()


def test_lean_leaves_the_drafts_alone(drafted: Site, tmp_path: Path) -> None:
    site = drafted.elsewhere(tmp_path / "site")
    assert draft(site, "--lean").code == 0
    assert disk(site.cache, site.out) < 1.1 * disk(site.out)
    done = draft(site, "--events", site.root / "again")
    assert done.code == 0 and '"done"' not in (site.root / "again").read_text()


@pytest.mark.parametrize("verb", ["verify", "inspect", "sign", "push"])
def test_a_draft_is_no_artifact(site: Site, verb: str) -> None:
    assert draft(site).code == 0
    key = site.root / "key"
    command("enginewright", "keygen", key, cwd=site.root)
    more = {"sign": ("--key", f"{key}.key"), "push": (f"oci:{site.root / 'layout'}:1",)}.get(verb, ())
    done = command("enginewright", verb, site.out / "small" / "one", *more, cwd=site.root)
    refused(done, 64, "is a draft, not an artifact", "`build` with the same recipe")


def test_drafts_and_artifacts_never_replace_each_other(site: Site) -> None:
    ids = site.made()
    refused(draft(site), 3, "small/one is there and is no draft")
    assert site.ids() == ids
    elsewhere = Site(site.root, site.cache, site.root / "drafts")
    assert draft(elsewhere).code == 0
    before = snapshot(elsewhere.out)
    refused(elsewhere.build(), 3, "is not an artifact")
    assert snapshot(elsewhere.out) == before


def test_one_target_and_an_override(site: Site) -> None:
    assert draft(site, "--target", "two", "--set", "targets.two.note=mine").code == 0
    assert [path.name for path in site.out.glob("small/[!.]*")] == ["two"]
    refused(draft(site, "--target", "three"), 64, "has no target 'three'")


def test_a_host_without_the_memory_is_told_so(drafted: Site) -> None:
    refused(draft(Site(drafted.root, drafted.root / "empty", drafted.out), "--memory", "10MB"), 5, "10.0 MB of memory")


def test_a_draft_that_is_stopped_leaves_nothing_half_made(tmp_path: Path) -> None:
    site = Site.write(tmp_path / "site")
    running = Running(["enginewright", "draft", *site.argv()[1:]], site.root, None)
    wait_for(running.workers, "a step")
    running.signal(signal.SIGKILL)
    assert running.end().code == -signal.SIGKILL
    assert not list(site.out.glob("small/[!.]*"))
    assert draft(site, "--target", "cpu-fp32").code == 0
