"""Stage fetch: copied, shared or downloaded, verified; and every way in which a source can go away."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest

from pipeline import digest
from pipeline.digest import StatCache, sha256_file
from pipeline.errors import EnginewrightError, NetworkError, RecipeError, StageError
from pipeline.hub import explain
from pipeline.pin import Locked, pin
from pipeline.recipe import Data, Model, Recipe
from pipeline.stages import fetch
from pipeline.step import silent
from pipeline.store import Store
from tests.hub import Fault, Hub, serving

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 4096,
    "1_Pooling/config.json": b"{}",
    "modules.json": b'[{"path": "1_Pooling", "type": "x.Pooling"}]',
    "added_tokens.json": b"",
}
LARGE = 100_000
"""In these tests a file is large from here on."""


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "LINK_FROM", LARGE)
    monkeypatch.setattr(fetch, "KEEP_TO", LARGE)
    monkeypatch.setattr(fetch, "BLOCK", 1 << 16)
    monkeypatch.setattr(explain, "BACKOFF_S", 0.001)
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A model folder, untouched since long ago, beside a recipe that is not there."""
    for name, data in FILES.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (1_000_000_000, 1_000_000_000))
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with `org/tiny`: the same files as the local folder. The library's own cache is empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    for hub in serving():
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.commit("org/tiny", FILES)
        yield hub


def pinned(here: Path, source: str = "model", data: str | None = None, **how: Any) -> Locked:
    wanted = Recipe(name="tiny", model=Model(source=source), targets={}, calibration=Data(path=data) if data else None)
    return pin(wanted, here / "tiny.yaml", cache=here / "cache", **how)


def fetched(here: Path, locked: Locked, role: str = "model", name: str = "out", progress: Any = silent) -> Path:
    """Run the step into a new folder."""
    out = here / name
    out.mkdir()
    step = locked.step(role)
    step.stage.run({}, step.options, out, progress)
    return out


def refusal(kind: type[EnginewrightError], run: Callable[[], object]) -> str:
    """The whole text of the error."""
    with pytest.raises(kind) as caught:
        run()
    assert type(caught.value) is kind
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder; symbolic links are not allowed."""
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# From this machine.


def test_a_folder_is_copied(here: Path) -> None:
    told: list[tuple[float, float]] = []
    out = fetched(here, pinned(here), progress=lambda done, total=0, note="": told.append((done, total)))
    assert contents(out) == FILES
    total = sum(map(len, FILES.values()))
    assert told[-1] == (total, total)
    assert sorted(told) == told


def test_small_files_are_copies_and_large_ones_shared(here: Path) -> None:
    out = fetched(here, pinned(here))
    small, large = "config.json", "model.safetensors"
    assert (out / small).stat().st_ino != (here / "model" / small).stat().st_ino
    if not reflinks(here):
        assert (out / large).samefile(here / "model" / large)


def test_a_reflink_is_its_own_file(here: Path) -> None:
    if not reflinks(here):
        pytest.skip("this file system has no reflinks")
    out = fetched(here, pinned(here))
    assert not (out / "model.safetensors").samefile(here / "model" / "model.safetensors")


def reflinks(folder: Path) -> bool:
    """Whether `cp`, asked to share blocks or fail, succeeds here."""
    (folder / "a").write_bytes(b"1" * 8192)
    return subprocess.run(["cp", "--reflink=always", folder / "a", folder / "b"], capture_output=True).returncode == 0


def test_a_known_large_file_is_not_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = pinned(here)
    read: list[str] = []
    pour = fetch._pour

    def spy(source: Path, *rest: Any) -> str:
        read.append(source.name)
        return pour(source, *rest)

    monkeypatch.setattr(fetch, "_pour", spy)
    fetched(here, locked)
    assert "model.safetensors" not in read
    assert "config.json" in read
    # The link moved the file's ctime; the next plan knows it all the same.
    monkeypatch.setattr(digest, "sha256_file", lambda path: pytest.fail(f"{path} is read again"))
    assert pinned(here) == locked
    shutil.rmtree(here / "out")
    assert pinned(here) == locked


def test_a_link_is_copied_where_links_do_not_reach(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_share", lambda source, place: False)
    out = fetched(here, pinned(here))
    assert contents(out) == FILES
    assert not (out / "model.safetensors").samefile(here / "model" / "model.safetensors")


def test_another_file_system(here: Path, tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm") / f"enginewright-{os.getpid()}"
    if not os.access("/dev/shm", os.W_OK) or Path("/dev/shm").stat().st_dev == here.stat().st_dev:
        pytest.skip("there is no second file system")
    try:
        elsewhere.mkdir()
        options = pinned(here).step("model").options
        fetch.run({}, options, elsewhere, silent)
        assert contents(elsewhere) == FILES
    finally:
        shutil.rmtree(elsewhere)


def test_links_are_resolved(here: Path) -> None:
    (here / "model").rename(here / "blobs")
    (here / "model" / "1_Pooling").mkdir(parents=True)
    for name in FILES:
        (here / "model" / name).symlink_to(here / "blobs" / name)
    assert contents(fetched(here, pinned(here))) == FILES


def test_the_store_takes_the_result_and_leaves_the_source_alone(here: Path) -> None:
    locked = pinned(here)
    large = here / "model" / "model.safetensors"
    mode = large.stat().st_mode
    store, options = Store(here / "cache"), locked.step("model").options
    with store.locked("k"), store.adding("k", {}, {}) as out:
        fetch.run({}, options, out, silent)
    assert large.stat().st_mode == mode
    entry = store.get("k")
    assert entry is not None
    assert {file["path"]: file["digest"] for file in entry.files} == {f.path: f.digest for f in locked.model.files}
    with large.open("r+b") as stream:  # the user's own file, changed in place: the store notices
        stream.write(b"new")
    assert store.get("k", deep=True) is None or not (entry.out / "model.safetensors").samefile(large)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("same_size", [True, False])
def test_a_file_that_changed_since_planning(here: Path, name: str, same_size: bool) -> None:
    locked = pinned(here)
    changed = FILES[name].replace(b"llama", b"LLAMA")
    changed = (changed[:-1] + b"!" if changed == FILES[name] else changed) + (b"" if same_size else b" ")
    (here / "model" / name).write_bytes(changed)
    text = refusal(StageError, lambda: fetched(here, locked))
    assert text.startswith(f"model/{name} changed since the build was planned: ")
    assert text.endswith("hint: run the build again: it plans with the files as they are")
    if same_size:
        was = next(file.digest for file in locked.model.files if file.path == name)
        assert f"expected {was}, got {sha256_file(here / 'model' / name)}" in text
    assert not (here / "out" / name).exists()
    assert contents(fetched(here, pinned(here), name="again"))[name] == changed


def test_a_change_that_hides_is_found_and_not_planned_again(here: Path) -> None:
    """A linked file whose bytes changed and whose mtime was put back: planning trusts it, fetching does not."""
    large = here / "model" / "model.safetensors"
    (here / "second-name").hardlink_to(large)
    locked = pinned(here)
    large.write_bytes(FILES["model.safetensors"][:-1] + b"!")
    os.utime(large, (1_000_000_000, 1_000_000_000))
    assert StatCache(here / "cache").get(large) is not None
    assert "changed since the build was planned" in refusal(StageError, lambda: fetched(here, locked))
    assert contents(fetched(here, pinned(here), name="again"))["model.safetensors"].endswith(b"!")


def test_a_file_that_vanished(here: Path) -> None:
    locked = pinned(here)
    (here / "model" / "config.json").unlink()
    assert refusal(StageError, lambda: fetched(here, locked)) == (
        "model/config.json is gone since the build was planned\n"
        "hint: run the build again: it plans with the files as they are"
    )
    shutil.rmtree(here / "model")
    assert "is gone since" in refusal(StageError, lambda: fetched(here, locked, name="again"))


def test_a_file_that_cannot_be_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = pinned(here)

    def no(*args: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(fetch, "_pour", no)
    text = refusal(StageError, lambda: fetched(here, locked))
    assert text == "model/1_Pooling/config.json: Permission denied"


def test_a_full_disk(here: Path) -> None:
    disk = here / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"may not mount: {made.stderr.strip()}")
    try:
        locked = pinned(here)
        text = refusal(StageError, lambda: fetched(here, locked, name="disk/out"))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert text.startswith(f"no space left for {disk / 'out' / 'model.safetensors'}: 1,048,576 bytes needed, ")
    assert "bytes free\nhint: free some space" in text


# Data.


@pytest.mark.parametrize(("name", "stored"), [("a.txt", "data.txt"), ("b.jsonl", "data.jsonl"), ("c.md", "data.txt")])
def test_a_data_file(here: Path, name: str, stored: str) -> None:
    (here / name).write_text("schön, 語\n" * 20_000, encoding="utf-8")
    out = fetched(here, pinned(here, data=name), "calibration")
    assert contents(out) == {stored: (here / name).read_bytes()}
    assert not (out / stored).samefile(here / name)


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"one\ntwo\nthr\xffee\n", ":3: not UTF-8 text (byte 0xff)"),
        (b"latin: \xe9t\xe9\n", ":1: not UTF-8 text (byte 0xe9)"),
        (b"x" * ((1 << 16) - 1) + "ö".encode() + b"\n\xfe", ":2: not UTF-8 text (byte 0xfe)"),
        (b"a line\ncut \xe8\xaa", ":2: not UTF-8 text (byte 0xe8)"),
    ],
)
def test_data_that_are_not_utf8(here: Path, data: bytes, where: str) -> None:
    (here / "held.txt").write_bytes(data)
    locked = pinned(here, data="held.txt")
    text = refusal(RecipeError, lambda: fetched(here, locked, "calibration"))
    assert text == f"held.txt{where}\nhint: save the file as UTF-8"


def test_data_that_changed_since_planning(here: Path) -> None:
    (here / "held.txt").write_text("one")
    locked = pinned(here, data="held.txt")
    (here / "held.txt").write_text("two")
    assert refusal(StageError, lambda: fetched(here, locked, "calibration")).startswith("held.txt changed since")


# From the hub.


def test_a_model_from_the_hub(here: Path, hub: Hub) -> None:
    told: list[tuple[float, float]] = []
    locked = pinned(here, "hf://org/tiny")
    hub.requests.clear()
    out = fetched(here, locked, progress=lambda done, total=0, note="": told.append((done, total)))
    assert contents(out) == FILES
    assert told[-1][0] == told[-1][1] == sum(map(len, FILES.values()))
    # What planning had to read is not downloaded again, and the large file is not kept twice.
    assert {request.path.rpartition("/")[2] for request in hub.requests} == {"model.safetensors"}
    assert not any(path.stat().st_size > LARGE for path in (here / "cache" / "sources").iterdir())
    assert (out / "model.safetensors").stat().st_nlink == 1


def test_without_a_cache_nothing_is_left(here: Path, hub: Hub) -> None:
    from dataclasses import replace

    options = replace(pinned(here, "hf://org/tiny").step("model").options, cache=None)
    out = here / "out"
    out.mkdir()
    fetch.run({}, options, out, silent)
    assert contents(out) == FILES


def test_an_interrupted_fetch_goes_on(here: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = pinned(here, "hf://org/tiny")
    hub.faults["model.safetensors"] = Fault("drop", 500_000, times=1)
    with monkeypatch.context() as patch:
        patch.setattr(explain, "ATTEMPTS", 1)
        assert "broke" in refusal(NetworkError, lambda: fetched(here, locked))
    hub.requests.clear()
    assert contents(fetched(here, locked, name="again")) == FILES
    assert hub.asked("model.safetensors")[0].headers["range"] == "bytes=500000-"


def test_one_failure_stops_the_other_downloads(here: Path, hub: Hub) -> None:
    locked = pinned(here, "hf://org/tiny")
    shutil.rmtree(here / "cache" / "sources")
    hub.faults["config.json"] = Fault("status", 403)
    text = refusal(NetworkError, lambda: fetched(here, locked))
    assert "does not let you read hf://org/tiny (403)" in text


def test_wrong_bytes_from_the_hub(here: Path, hub: Hub) -> None:
    from pipeline.errors import VerificationError

    locked = pinned(here, "hf://org/tiny")
    hub.faults["model.safetensors"] = Fault("bytes", 9)
    text = refusal(VerificationError, lambda: fetched(here, locked))
    assert "model.safetensors of hf://org/tiny at" in text
    assert "is not what the hub announced: expected sha256:" in text
    assert not list((here / "cache" / "sources").glob("*.partial"))


def test_a_commit_that_was_taken_away(here: Path, hub: Hub) -> None:
    locked = pinned(here, "hf://org/tiny")
    del hub.repos["org/tiny"]
    text = refusal(NetworkError, lambda: fetched(here, locked))
    assert "hf://org/tiny is not on" in text


def test_offline_takes_what_was_downloaded(here: Path, hub: Hub) -> None:
    pinned(here, "hf://org/tiny")
    locked = pinned(here, "hf://org/tiny", offline=True)
    hub.requests.clear()
    text = refusal(NetworkError, lambda: fetched(here, locked))
    assert text == (
        "model.safetensors of hf://org/tiny was never downloaded, and --offline forbids it\n"
        "hint: run the command once without --offline"
    )
    assert hub.requests == []


def test_the_librarys_own_cache_is_used(here: Path, hub: Hub) -> None:
    """A model that huggingface_hub has downloaded before is taken from there, offline too."""
    huggingface_hub.snapshot_download("org/tiny", endpoint=hub.endpoint, cache_dir=here / "hub-cache")
    pinned(here, "hf://org/tiny")
    locked = pinned(here, "hf://org/tiny", offline=True)
    hub.requests.clear()
    assert contents(fetched(here, locked)) == FILES
    assert hub.requests == []


def test_a_damaged_file_in_the_librarys_cache_is_not_used(here: Path, hub: Hub) -> None:
    folder = Path(huggingface_hub.snapshot_download("org/tiny", endpoint=hub.endpoint, cache_dir=here / "hub-cache"))
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    locked = pinned(here, "hf://org/tiny")
    assert contents(fetched(here, locked)) == FILES
    assert blob.read_bytes().endswith(b"!")


def test_a_damaged_download_is_not_used(here: Path, hub: Hub) -> None:
    locked = pinned(here, "hf://org/tiny")
    for path in (here / "cache" / "sources").iterdir():
        path.write_bytes(path.read_bytes() + b" ")
    assert contents(fetched(here, locked)) == FILES


def test_a_disk_too_small_is_told_before_the_download(here: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = pinned(here, "hf://org/tiny")
    hub.requests.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))  # type: ignore[attr-defined]
    text = refusal(StageError, lambda: fetched(here, locked))
    assert text.startswith(f"no space left for {here / 'out'}: 1,048,576 bytes needed, 1,000 bytes free\nhint: ")
    assert hub.requests == []
