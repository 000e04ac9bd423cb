"""Assembly: the same bytes give the same artifact, the swap is whole or nothing, and a second build writes nothing."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.artifact import attest, package, place, swap
from pipeline.artifact.package import assemble
from pipeline.artifact.verify import examine, verify
from pipeline.errors import EnginewrightError, RecipeError, StageError
from tests.artifact.helpers import build, edit_manifest, facts, parity, rewrite, snapshot, write_engine, write_golden

ROOT = Path(__file__).parents[2]


def test_an_artifact_holds_the_engine_the_golden_inputs_a_card_and_a_licence(tmp_path: Path) -> None:
    made = build(tmp_path)
    files = {path.relative_to(made.path).as_posix() for path in made.path.rglob("*") if path.is_file()}
    assert files == {
        *("model.onnx", "tokenizer.json", "genai_config.json", "extra/note.json"),
        *("golden/golden.json", "golden/inputs.input_ids.npy"),
        *("LICENSE", "README.md", "manifest.json", ".attest/parity.json"),
    }
    report = verify(made.path)
    assert report.artifact_id == made.artifact_id
    assert made.changed
    assert [file.path for file in report.manifest.files if file.role == "golden"] == [
        "golden/golden.json",
        "golden/inputs.input_ids.npy",
    ]
    card = (made.path / "README.md").read_text()
    assert "base_model: org/tiny" in card
    assert "enginewright generate ." in card
    assert "Apache-2.0" in (made.path / "LICENSE").read_text()


def test_files_are_read_only_and_share_the_stores_blocks(tmp_path: Path) -> None:
    made = build(tmp_path)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in made.path.rglob("*") if path.is_file()}
    assert {mode for path, mode in modes.items() if ".attest" not in path.parts} == {0o444}
    assert (made.path / "model.onnx").samefile(tmp_path / "engine/model.onnx")


def test_a_file_that_somebody_may_still_write_elsewhere_is_copied(tmp_path: Path) -> None:
    own = tmp_path / "own.bin"
    own.write_bytes(b"the user's own weights")
    engine = write_engine(tmp_path / "engine")
    os.link(own, engine / "weights.bin")
    made = build(tmp_path)
    assert not (made.path / "weights.bin").samefile(own)
    own.write_bytes(b"changed")
    verify(made.path)
    assert os.access(own, os.W_OK)
    assert stat.S_IMODE(own.stat().st_mode) & 0o200


def test_copies_on_wish_and_across_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = build(tmp_path, link="copy")
    assert not (copied.path / "model.onnx").samefile(tmp_path / "engine/model.onnx")

    def across(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", across)
    other = build(tmp_path, destination=tmp_path / "elsewhere/tiny")
    assert other.artifact_id == copied.artifact_id
    assert not (other.path / "model.onnx").samefile(tmp_path / "engine/model.onnx")


def test_the_id_does_not_depend_on_place_user_or_time(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, pathlib
        from tests.artifact.helpers import build
        print(build(pathlib.Path(sys.argv[1])).artifact_id)
        """
    )
    ids = set()
    for number, user in enumerate(("alice", "bob")):
        home = tmp_path / user
        home.mkdir()
        environment = {**os.environ, "USER": user, "LOGNAME": user, "HOME": str(home), "PYTHONPATH": str(ROOT)}
        environment |= {"TZ": f"UTC+{number * 7}", "LC_ALL": ("C", "C.UTF-8")[number], "PYTHONHASHSEED": str(number)}
        place_ = home / ("deeper/" * number)
        place_.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", script, str(place_)], env=environment, capture_output=True, text=True, check=True
        )
        ids.add(done.stdout)
        os.utime(place_, (number, number))
    assert len(ids) == 1


def test_what_ran_differently_does_not_change_the_id_and_what_came_out_does(tmp_path: Path) -> None:
    first = build(tmp_path)
    again = build(tmp_path, destination=tmp_path / "b", attestations={"parity": parity("deferred", reason="no GPU")})
    assert first.artifact_id == again.artifact_id
    write_engine(tmp_path / "other/engine", weights=b"other weights")
    assert build(tmp_path / "other").artifact_id != first.artifact_id
    named = build(tmp_path, destination=tmp_path / "c", manifest_facts=facts(version="1.0.1"))
    assert named.artifact_id != first.artifact_id


def test_the_second_build_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build(tmp_path)
    os.utime(made.path / "manifest.json", ns=(2**62, 2**62))  # so far from the files' times that no clock tick matters
    before, listing = snapshot(made.path), sorted(made.path.parent.iterdir())
    monkeypatch.setattr(package, "sha256_file", lambda path: pytest.fail(f"{path} was hashed"))
    again = build(tmp_path)
    assert (again.artifact_id, again.changed) == (made.artifact_id, False)
    assert snapshot(made.path) == before
    assert sorted(made.path.parent.iterdir()) == listing


def test_the_second_build_works_in_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build(tmp_path)
    monkeypatch.setattr(swap, "locked", lambda path: pytest.fail("it asked for a lock"))  # root may write anywhere
    for folder in (made.path.parent, made.path, made.path / ".attest"):
        folder.chmod(0o555)
    try:
        assert not build(tmp_path).changed
    finally:
        for folder in (made.path.parent, made.path, made.path / ".attest"):
            folder.chmod(0o755)


def test_without_an_attestation_that_vouches_every_file_is_hashed(tmp_path: Path) -> None:
    made = build(tmp_path, attestations={})
    before = snapshot(made.path)
    assert not build(tmp_path, attestations={}).changed
    assert snapshot(made.path) == before


DAMAGES = {
    "one byte of a copy": lambda a: rewrite(a / "model.onnx", b"Weights " + b"weights " * 499),
    "a truncated file": lambda a: rewrite(a / "model.onnx", b"weights "),
    "a missing file": lambda a: (a / "tokenizer.json").unlink(),
    "an extra file": lambda a: (a / "evil.py").write_text("import os"),
    "a changed card": lambda a: rewrite(a / "README.md", b"# other"),
    "a changed digest in the manifest": lambda a: edit_manifest(
        a,
        files=[{**f, "digest": "sha256:" + "0" * 64} for f in json.loads((a / "manifest.json").read_bytes())["files"]],
    ),
    "a changed field of the manifest": lambda a: edit_manifest(a, precision="fp32"),
    "a manifest in another form": lambda a: rewrite(
        a / "manifest.json", json.dumps(json.loads((a / "manifest.json").read_bytes()), indent=1).encode()
    ),
    "a truncated manifest": lambda a: rewrite(a / "manifest.json", (a / "manifest.json").read_bytes()[:50]),
    "a missing manifest": lambda a: (a / "manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
@pytest.mark.parametrize("link", ["auto", "copy"])
def test_a_damaged_artifact_is_made_whole(tmp_path: Path, damage: object, link: str) -> None:
    made = build(tmp_path, link=link)
    damage(made.path)  # type: ignore[operator]
    again = build(tmp_path, link=link, attestations={"parity": parity("deferred", reason="not run")})
    assert (again.artifact_id, again.changed) == (made.artifact_id, True)
    assert verify(made.path).ok
    said = attest.read_attestation(made.path, "parity", made.artifact_id)
    assert said is not None
    assert said["predicate"]["verdict"] == "passed", "a verdict was lost to one that did not run"


def test_a_copy_changed_in_place_is_made_whole(tmp_path: Path) -> None:
    made = build(tmp_path, link="copy")
    file = made.path / "model.onnx"
    file.chmod(0o644)
    with file.open("r+b") as stream:
        stream.write(b"W")
    assert build(tmp_path, link="copy").changed
    assert verify(made.path).ok


def test_a_new_engine_replaces_the_artifact_and_its_attestations(tmp_path: Path) -> None:
    first = build(tmp_path, attestations={"parity": parity(), "benchmark": parity()})
    rewrite_engine = tmp_path / "next"
    write_engine(rewrite_engine / "engine", weights=b"new")
    write_golden(rewrite_engine / "golden")
    second = build(rewrite_engine, destination=first.path)
    assert second.artifact_id != first.artifact_id
    assert verify(first.path).artifact_id == second.artifact_id
    assert not (first.path / ".attest/benchmark.json").exists(), "it speaks of the earlier artifact"
    assert [path.name for path in first.path.parent.iterdir() if path.name.startswith(".")] == [".tiny.lock"]


def test_a_verdict_replaces_a_deferred_one_and_nothing_else_is_written(tmp_path: Path) -> None:
    made = build(tmp_path, attestations={"parity": parity("deferred", reason="no GPU")})
    before = snapshot(made.path)
    build(tmp_path, attestations={"parity": parity()})
    after = snapshot(made.path)
    assert before.pop(".attest/parity.json") != after[".attest/parity.json"]
    assert json.loads(after.pop(".attest/parity.json")[2])["predicate"]["verdict"] == "passed"
    assert before == after


@pytest.mark.parametrize("name", ["manifest.json", "golden/x", ".attest/x", "Manifest.JSON"])
def test_an_engine_that_takes_our_names_is_refused(tmp_path: Path, name: str) -> None:
    path = write_engine(tmp_path / "engine") / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    with pytest.raises(StageError, match="artifact itself uses"):
        build(tmp_path)


@pytest.mark.parametrize("name", ["a:b", "a\\b", "trailing.", "MODEL.onnx"])
def test_an_engine_with_names_that_no_manifest_holds_is_refused(tmp_path: Path, name: str) -> None:
    (write_engine(tmp_path / "engine") / name).write_text("x")
    with pytest.raises(StageError, match="would not be valid"):
        build(tmp_path)
    assert not (tmp_path / "out/tiny").exists()


def test_links_and_special_files_are_refused(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "engine")
    (engine / "link").symlink_to("/etc/passwd")
    with pytest.raises(StageError, match="not a regular file"):
        build(tmp_path)
    (engine / "link").unlink()
    os.mkfifo(engine / "pipe")
    with pytest.raises(StageError, match="not a regular file"):
        build(tmp_path)


def test_a_manifest_that_tells_of_this_machine_is_refused_and_the_old_artifact_stays(tmp_path: Path) -> None:
    made = build(tmp_path)
    before = snapshot(made.path)
    recipe = {"model": {"source": str(tmp_path / "model")}}
    with pytest.raises(RecipeError, match=r"\$.recipe.model.source"):
        build(tmp_path, manifest_facts=facts(recipe=recipe))
    assert snapshot(made.path) == before


def test_the_engines_own_card_and_the_given_licence_are_used(tmp_path: Path) -> None:
    (write_engine(tmp_path / "engine") / "README.md").write_text("# The model's own card")
    (tmp_path / "LICENSE").write_text("Full text.")
    made = build(tmp_path, license_file=tmp_path / "LICENSE")
    assert (made.path / "README.md").read_text() == "# The model's own card"
    assert (made.path / "LICENSE").read_text() == "Full text."


def test_without_a_licence_there_is_no_licence_file_and_the_card_says_so(tmp_path: Path) -> None:
    made = build(tmp_path, manifest_facts=facts(licenses=()))
    assert not (made.path / "LICENSE").exists()
    assert "Ask its publisher" in (made.path / "README.md").read_text()


def test_somebodys_folder_is_not_replaced(tmp_path: Path) -> None:
    home = tmp_path / "out/tiny"
    home.mkdir(parents=True)
    (home / "thesis.tex").write_text("ten years of work")
    with pytest.raises(StageError, match="not an artifact"):
        build(tmp_path)
    (home / "manifest.json").write_text('{"name": "A browser extension"}')
    with pytest.raises(StageError, match="not an artifact"):
        build(tmp_path)
    assert (home / "thesis.tex").read_text() == "ten years of work"
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(StageError, match="not a folder"):
        build(tmp_path, destination=file)


def _next(tmp_path: Path) -> Path:
    write_engine(tmp_path / "next/engine", weights=b"new")
    write_golden(tmp_path / "next/golden")
    return tmp_path / "next"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("where", ["place", "write", "sync"])
def test_a_disk_that_refuses_leaves_the_old_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, where: str
) -> None:
    made = build(tmp_path)
    before = snapshot(made.path)

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code), str(tmp_path / "out/.tiny.assembling/model.onnx"))

    monkeypatch.setattr(swap if where == "sync" else package, where, refuse)
    with pytest.raises(StageError) as caught:
        build(_next(tmp_path), destination=made.path)
    assert caught.value.exit_code == 3
    assert ("no space left" in caught.value.message) == (code == errno.ENOSPC)
    assert str(tmp_path) in caught.value.message
    assert snapshot(made.path) == before
    assert not swap.left_over(made.path)


@pytest.mark.parametrize("exchange", [True, False])
def test_both_ways_of_swapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(swap, "_exchange", lambda one, other: False)
    made = build(tmp_path)
    changed = build(_next(tmp_path), destination=made.path)
    assert verify(made.path).artifact_id == changed.artifact_id
    assert not swap.left_over(made.path)


KILLED = """
import os, pathlib, sys
from pipeline.artifact import swap
from tests.artifact.helpers import build
root, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
kill = lambda *_: os._exit(9)
real_rename = pathlib.Path.rename
if moment == "assembling":
    swap.sync = kill
elif moment == "before the swap":
    swap.publish = kill
elif moment == "between the renames":
    swap._exchange = lambda one, other: False
    calls = []
    def rename(self, target):
        calls.append(self)
        if len(calls) == 2:
            os._exit(9)
        return real_rename(self, target)
    pathlib.Path.rename = rename
elif moment == "after the exchange":
    swap.remove = lambda path: os._exit(9) if path.exists() else None
elif moment == "after the renames":
    swap._exchange = lambda one, other: False
    swap.remove = lambda path: os._exit(9) if path.exists() else None
build(root / "next", destination=root / "out/tiny")
"""


@pytest.mark.parametrize(
    "moment", ["assembling", "before the swap", "between the renames", "after the exchange", "after the renames"]
)
def test_killed_at_any_moment_a_whole_artifact_is_there_and_the_next_build_tidies(tmp_path: Path, moment: str) -> None:
    old = build(tmp_path)
    _next(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), moment],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 9, done.stderr
    whole = old.path if old.path.exists() else swap.previous(old.path)
    assert whole == (swap.previous(old.path) if moment == "between the renames" else old.path)
    now = verify(whole).artifact_id
    assert (now == old.artifact_id) == (not moment.startswith("after"))
    assert swap.left_over(old.path)
    if moment == "between the renames":
        with pytest.raises(EnginewrightError, match="does not exist") as caught:
            examine(old.path)
        assert ".tiny.previous" in caught.value.hint
    new = build(tmp_path / "next", destination=old.path)
    assert verify(old.path).artifact_id == new.artifact_id != old.artifact_id
    assert not swap.left_over(old.path)


def test_what_was_moved_aside_comes_back_even_if_the_next_build_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build(tmp_path)
    made.path.rename(swap.previous(made.path))
    monkeypatch.setattr(package, "place", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(StageError):
        build(_next(tmp_path), destination=made.path)
    assert verify(made.path).artifact_id == made.artifact_id


def test_an_old_artifact_in_read_only_folders_is_replaced(tmp_path: Path) -> None:
    made = build(tmp_path)
    for folder in (made.path / "extra", made.path / "golden", made.path):
        folder.chmod(0o555)
    assert build(_next(tmp_path), destination=made.path).changed
    assert verify(made.path).ok
    place.remove(made.path)
    place.remove(made.path)


def test_a_relative_destination_and_a_linked_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    engine = write_engine(tmp_path / "engine")
    made = assemble(engine, golden_dir=None, manifest_facts=facts(), destination=Path("../out/x/../tiny"))
    assert made.path == Path("../out/x/../tiny")
    assert verify(tmp_path / "out/tiny").ok
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assemble(engine, golden_dir=None, manifest_facts=facts(), destination=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert verify(tmp_path / "disk").ok


def test_a_float_where_the_manifest_has_none_is_a_fault_that_is_told(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"\$\.interface\.limits"):
        build(tmp_path, manifest_facts=facts(interface=replace(facts().interface, limits={"x": 1.5})))
    with pytest.raises(StageError, match="cannot be written"):
        build(tmp_path, manifest_facts=facts(recipe={"x": float("nan")}))
