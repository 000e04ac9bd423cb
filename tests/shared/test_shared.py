"""The shared store as a runner meets it, on each kind of place: what one builder made, another has, checked."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RecipeError, UnavailableError
from pipeline.hardware import probe
from pipeline.plan import Plan, plan
from pipeline.run.local import Runner
from pipeline.run.once import Event
from pipeline.shared import Record, open_shared
from pipeline.step import Stage, Step
from pipeline.store import Entry, Store
from tests.fakes import DIFFER, WRITE, Write
from tests.registry.server import Registry
from tests.shared.s3 import BUCKET, S3


def planned(stage: Stage[Any] = WRITE, text: str = "a") -> Plan:
    steps = (Step("a", stage, Write(text=text), {}), Step("b", WRITE, Write(text="b"), {"first": "a"}))
    return plan({"t": (steps, probe())}, lambda tool, toolchain: "1")


def built(root: Path, url: str, made: Plan, **how: Any) -> tuple[dict[str, Entry], list[Event]]:
    """One builder, with a store of its own."""
    events: list[Event] = []
    done = Runner(Store(root), events.append, {}, beyond=open_shared(url, **how)).run(made)
    for key, entry in done.items():
        assert Store(root).get(key, deep=True) == entry
    return done, events


def kinds(events: list[Event]) -> list[str]:
    return [
        "shared" if e.get("shared") else e["event"] for e in events if e["event"] in ("hit", "done", "start", "note")
    ]


def test_what_one_builder_made_another_has(url: str, tmp_path: Path) -> None:
    made = planned()
    first, events = built(tmp_path / "one", url, made)
    assert kinds(events) == ["start", "done", "start", "done"]
    second, events = built(tmp_path / "two", url, made)
    assert kinds(events) == ["shared", "shared"]
    assert (second[made.targets["t"]["b"]].out / "text").read_text() == "ab"
    assert {key: entry.run for key, entry in first.items()} == {key: entry.run for key, entry in second.items()}
    assert Store(tmp_path / "two").key_text(made.steps[0].key) == Store(tmp_path / "one").key_text(made.steps[0].key)
    _, events = built(tmp_path / "two", url, made)
    assert kinds(events) == ["hit", "hit"]


def test_a_build_with_nothing_to_do_asks_for_each_record_once(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    url, made = (tmp_path / "shared").as_uri(), planned()
    done, _ = built(tmp_path / "one", url, made)
    shared, asked = open_shared(url), list[str]()
    place: Any = shared.place
    record, place.put = place.record, None  # nothing is written
    place.record = lambda key: (asked.append(key), record(key))[1]
    shared.look_up(done, lambda note: None)
    Runner(Store(tmp_path / "one"), lambda event: None, {}, beyond=shared).run(made)
    assert sorted(asked) == sorted(done)


def test_what_was_built_without_it_is_offered_later(url: str, tmp_path: Path) -> None:
    made = planned()
    Runner(Store(tmp_path / "one"), lambda event: None, {}).run(made)
    _, events = built(tmp_path / "one", url, made)
    assert kinds(events) == ["hit", "hit"]
    _, events = built(tmp_path / "two", url, made)
    assert kinds(events) == ["shared", "shared"]


def test_it_says_what_is_there(url: str, tmp_path: Path) -> None:
    made = planned()
    done, _ = built(tmp_path / "one", url, made)
    notes: list[str] = []
    there = open_shared(url).look_up([*done, f"test.write-{'0' * 64}"], notes.append)
    assert {key: record.size_bytes for key, record in there.items()} == {k: e.size_bytes for k, e in done.items()}
    assert not notes


def test_builders_that_race_go_on_with_one_result(url: str, tmp_path: Path) -> None:
    """Eight of them, of a stage that never writes the same twice."""
    made = planned(DIFFER)
    texts: list[str] = []
    shared = [open_shared(url) for _ in range(8)]
    together = threading.Barrier(len(shared))

    def build(number: int) -> None:
        runner = Runner(Store(tmp_path / str(number)), lambda event: None, {}, beyond=shared[number])
        together.wait()
        done = runner.run(made)
        texts.append((done[made.targets["t"]["a"]].out / "text").read_text())

    threads = [threading.Thread(target=build, args=(number,)) for number in range(len(shared))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == len(shared)
    last, events = built(tmp_path / "last", url, made)
    assert kinds(events) == ["shared", "shared"]
    if not url.startswith("oci:"):  # a registry has no way to let the first writer win
        assert set(texts) == {(last[made.targets["t"]["a"]].out / "text").read_text()}


def blob_of(entry: Entry) -> str:
    digits = entry.files[0]["digest"].removeprefix("sha256:")
    return f"blobs/sha256/{digits[:2]}/{digits}"


def damage(url: str, name: str, data: bytes | None, bucket: S3 | None) -> None:
    """Replace a blob or a record past our code; None removes it."""
    if bucket:
        path = f"{url.removeprefix(f's3://{BUCKET}/')}/{name}"
        assert path in bucket.objects()
        bucket.delete(path) if data is None else bucket.write(path, data)
        return
    file = Path(url.removeprefix("file://")) / name
    assert file.is_file()
    file.unlink()
    if data is not None:
        file.write_bytes(data)


DAMAGES = {
    "other bytes": (True, b"x"),
    "cut off": (True, b""),
    "longer": (True, b"a" * 1000),
    "removed": (True, None),
    "no JSON": (False, b'{"format": 1'),
    "not ours": (False, b"[]"),
    "an empty record": (False, b""),
    "another format": (False, b'{"format": 2, "key_text": {"stage": "s"}, "files": [], "run": {}}'),
}


@pytest.mark.parametrize("kind", ["file", "s3"])
@pytest.mark.parametrize("damaged", DAMAGES)
def test_a_corrupt_object_is_a_miss_and_is_mended(
    kind: str, damaged: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bucket = request.getfixturevalue("bucket") if kind == "s3" else None
    url = request.getfixturevalue("s3_url") if kind == "s3" else tmp_path.joinpath("shared").as_uri()
    (tmp_path / "shared").mkdir()
    made = planned()
    first, _ = built(tmp_path / "one", url, made)
    entry = first[made.targets["t"]["a"]]
    of_blob, data = DAMAGES[damaged]
    damage(url, blob_of(entry) if of_blob else f"results/{entry.key}.json", data, bucket)
    second, events = built(tmp_path / "two", url, made)
    assert kinds(events) == ["note", "start", "done", "shared"]
    assert "corrupt" in next(event["note"] for event in events if event["event"] == "note")
    assert (second[entry.key].out / "text").read_text() == "a"
    assert not list((tmp_path / "two" / "scratch").iterdir())
    _, events = built(tmp_path / "three", url, made)
    assert kinds(events) == ["shared", "shared"]


def test_a_record_under_another_key_is_a_miss(s3_url: str, bucket: S3, tmp_path: Path) -> None:
    """Whoever copies an object, or writes one by hand, passes nothing off as something else."""
    other, made = planned(text="other"), planned()
    built(tmp_path / "one", s3_url, other)
    prefix = s3_url.removeprefix(f"s3://{BUCKET}/")
    data = bucket.read(f"{prefix}/results/{other.steps[0].key}.json")
    bucket.write(f"{prefix}/results/{made.steps[0].key}.json", data)
    done, events = built(tmp_path / "two", s3_url, made)
    assert kinds(events) == ["note", "start", "done", "start", "done"]
    assert (done[made.steps[0].key].out / "text").read_text() == "a"


@pytest.mark.parametrize("path", ["../../../escaped", "/etc/escaped", "a/../../b", "C:\\x", ""])
def test_no_path_of_a_record_leaves_the_store(path: str, s3_url: str, bucket: S3, tmp_path: Path) -> None:
    made = planned()
    built(tmp_path / "one", s3_url, made)
    name = f"{s3_url.removeprefix(f's3://{BUCKET}/')}/results/{made.steps[0].key}.json"
    record = json.loads(bucket.read(name))
    record["files"][0]["path"] = path
    bucket.write(name, json.dumps(record).encode())
    _, events = built(tmp_path / "two" / "store", s3_url, made)
    assert kinds(events)[:2] == ["note", "start"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["store"]


def test_corrupt_blobs_of_a_registry_are_a_miss(registry: Registry, tmp_path: Path) -> None:
    url, made = f"oci://{registry.address}/damaged", planned(text="of the damaged one")
    first, _ = built(tmp_path / "one", url, made)
    entry = first[made.targets["t"]["a"]]
    registry.blob(entry.files[0]["digest"]).write_bytes(b"of the wicked one ")
    second, events = built(tmp_path / "two", url, made)
    assert kinds(events) == ["note", "start", "done", "shared"]
    assert (second[entry.key].out / "text").read_text() == "of the damaged one"


def test_a_result_in_a_registry_is_a_manifest_that_others_read(registry: Registry, tmp_path: Path) -> None:
    made = planned()
    done, _ = built(tmp_path / "one", f"oci://{registry.address}/read", made)
    key = made.steps[0].key
    assert registry.tags("read") == sorted(done)
    manifest = registry.manifest("read", key)
    assert [layer["annotations"]["org.opencontainers.image.title"] for layer in manifest["layers"]] == ["text"]
    config = registry.blob(manifest["config"]["digest"]).read_bytes()
    assert Record.read(key, config).files[0].digest == manifest["layers"][0]["digest"]


def test_a_reader_without_the_right_to_write_goes_on(tmp_path: Path) -> None:
    """CI of a fork: hits are taken, and what is built stays on that machine, which is said once."""
    root = tmp_path / "shared"
    root.mkdir()
    made, more = planned(), planned(text="more")
    built(tmp_path / "one", root.as_uri(), made)
    before = sorted(root.rglob("*"))
    _, events = built(tmp_path / "two", root.as_uri(), made, read_only=True)
    assert kinds(events) == ["shared", "shared"]
    _, events = built(tmp_path / "two", root.as_uri(), more, read_only=True)
    assert kinds(events) == ["start", "done", "start", "done"]
    assert sorted(root.rglob("*")) == before


def test_a_place_that_fails_fails_no_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for url in ("s3://store/x", f"file://{tmp_path}/nothing-here", "oci://127.0.0.1:9/store"):
        place = tmp_path / url.partition(":")[0]
        done, events = built(place, url, planned())
        assert len(done) == 2
        assert kinds(events) == ["note", "start", "done", "start", "done"], url
        assert "cannot be used" in next(event["note"] for event in events if event["event"] == "note")
        shutil.rmtree(place)


@pytest.mark.parametrize(
    "url", ["bucket/x", "s3x://bucket/x", "file://host/x", "file:relative", "oci://nowhere", "s3://me:secret@bucket/x"]
)
def test_what_is_no_shared_store_is_refused(url: str) -> None:
    with pytest.raises(RecipeError, match=r"--shared|not a reference") as caught:
        open_shared(url)
    assert caught.value.hint
    assert "secret" not in str(caught.value)


def test_a_protocol_whose_library_is_missing_names_the_extra() -> None:
    with pytest.raises(UnavailableError, match="gs://") as caught:
        open_shared("gs://bucket/x")
    assert "enginewright[gcs]" in caught.value.hint
