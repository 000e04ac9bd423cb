"""Verification: whatever differs from the manifest is told, all at once; what moved as a whole still verifies."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.artifact.verify import examine, verify
from pipeline.errors import RecipeError, VerificationError
from tests.artifact.helpers import build, edit_manifest, rewrite, write_engine


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return build(tmp_path, link="copy").path


def flip(path: Path, at: int = 0) -> None:
    """Change one byte in place, times kept."""
    found = path.stat()
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    path.chmod(0o444)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "one byte": (lambda a: flip(a / "model.onnx"), "model.onnx: has other contents"),
    "the last byte": (lambda a: flip(a / "model.onnx", -1), "model.onnx: has other contents"),
    "one byte of golden": (lambda a: flip(a / "golden/golden.json"), "golden/golden.json: has other contents"),
    "truncated": (lambda a: rewrite(a / "model.onnx", b"weights "), "has 8 bytes, and the manifest says 4000"),
    "emptied": (lambda a: rewrite(a / "model.onnx", b""), "has 0 bytes"),
    "grown": (lambda a: rewrite(a / "model.onnx", b"weights " * 501), "has 4008 bytes"),
    "missing": (lambda a: (a / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
    "a missing folder": (lambda a: shutil.rmtree(a / "golden"), "golden/golden.json: is missing"),
    "extra": (lambda a: (a / "evil.py").write_text("x"), "'evil.py': is not in the manifest"),
    "extra, hidden": (lambda a: (a / ".evil").write_text("x"), "'.evil': is not in the manifest"),
    "extra, of a hostile name": (lambda a: (a / "\x1b[2J").write_text("x"), r"'\x1b[2J': is not in the manifest"),
    "renamed": (lambda a: (a / "model.onnx").rename(a / "Model.onnx"), "'Model.onnx': is not in the manifest"),
    "a link in place of a file": (
        lambda a: ((a / "model.onnx").unlink(), (a / "model.onnx").symlink_to("/etc/passwd")),
        "'model.onnx': is a symbolic link",
    ),
    "a link to the same bytes": (
        lambda a: ((a / "model.onnx").rename(a.parent / "x"), (a / "model.onnx").symlink_to(a.parent / "x")),
        "'model.onnx': is a symbolic link",
    ),
    "a link in place of a folder": (
        lambda a: ((a / "extra").rename(a.parent / "x"), (a / "extra").symlink_to(a.parent / "x")),
        "'extra': is a symbolic link",
    ),
    "a pipe": (lambda a: ((a / "model.onnx").unlink(), os.mkfifo(a / "model.onnx")), "is not a regular file"),
    "setuid": (lambda a: (a / "model.onnx").chmod(0o4755), "another user's rights"),
    "a statement of another artifact": (
        lambda a: rewrite(
            a / ".attest/parity.json",
            (a / ".attest/parity.json").read_bytes().replace(b'"sha256": "', b'"sha256": "0', 1),
        ),
        "speaks of another artifact",
    ),
    "a statement that is none": (lambda a: (a / ".attest/x.json").write_text("{}"), "not an in-toto Statement"),
    "a manifest field": (lambda a: edit_manifest(a, precision="fp32"), "speaks of another artifact"),
    "a manifest in another form": (
        lambda a: rewrite(a / "manifest.json", (a / "manifest.json").read_bytes() + b"\n"),
        "not canonical",
    ),
    "no manifest": (lambda a: (a / "manifest.json").unlink(), "is missing"),
    "a linked manifest": (
        lambda a: ((a / "manifest.json").rename(a.parent / "m"), (a / "manifest.json").symlink_to(a.parent / "m")),
        "is not a regular file",
    ),
}


@pytest.mark.parametrize(("change", "problem"), CHANGES.values(), ids=list(CHANGES))
def test_every_change_is_told(artifact: Path, change: Callable[[Path], object], problem: str) -> None:
    assert examine(artifact).ok
    change(artifact)
    report = examine(artifact)
    assert any(problem in found for found in report.problems), report.problems
    assert not any("\x1b" in found for found in report.problems)
    with pytest.raises(VerificationError) as caught:
        verify(artifact)
    assert caught.value.exit_code == 6


def test_swapped_contents_are_told_as_such(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "engine")
    (engine / "a.bin").write_bytes(b"AAAA")
    (engine / "b.bin").write_bytes(b"BBBB")
    made = build(tmp_path, link="copy").path
    rewrite(made / "a.bin", b"BBBB")
    rewrite(made / "b.bin", b"AAAA")
    assert examine(made).problems == (
        "a.bin: holds what the manifest lists as 'b.bin'",
        "b.bin: holds what the manifest lists as 'a.bin'",
    )


def test_all_problems_at_once(artifact: Path) -> None:
    flip(artifact / "model.onnx")
    (artifact / "tokenizer.json").unlink()
    (artifact / "evil.py").write_text("x")
    rewrite(artifact / "golden/golden.json", b"")
    problems = examine(artifact).problems
    assert len(problems) == 4
    with pytest.raises(VerificationError, match="4 problems") as caught:
        verify(artifact)
    assert all(problem in caught.value.message for problem in problems)


def test_a_relocated_copy_verifies(artifact: Path, tmp_path: Path) -> None:
    before = verify(artifact)
    for copy in (tmp_path / "else where/é", tmp_path / "b"):
        shutil.copytree(artifact, copy, copy_function=shutil.copyfile)  # neither modes nor times come along
        assert verify(copy).artifact_id == before.artifact_id
        assert verify(copy).checked == before.checked == 8


def test_a_read_only_tree_verifies(artifact: Path) -> None:
    folders = [path for path in (artifact, *artifact.rglob("*")) if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert verify(artifact).ok
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_a_linked_folder_verifies(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(artifact)
    assert verify(tmp_path / "current").ok


def test_files_that_anyone_may_write_are_warned_of(artifact: Path) -> None:
    assert not verify(artifact).warnings
    (artifact / "model.onnx").chmod(0o666)
    assert verify(artifact).warnings == ("'model.onnx': anyone on this machine may write it",)


def test_verification_writes_nothing(artifact: Path) -> None:
    before = {path: path.stat() for path in artifact.rglob("*")}
    verify(artifact)
    after = {path: path.stat() for path in artifact.rglob("*")}
    assert {p: (s.st_mtime_ns, s.st_ctime_ns) for p, s in before.items()} == {
        p: (s.st_mtime_ns, s.st_ctime_ns) for p, s in after.items()
    }


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_text("x")], ids=["missing", "a file"])
def test_what_is_no_folder_is_a_usage_error(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "x")
    with pytest.raises(RecipeError, match=r"does not exist|not a folder") as caught:
        verify(tmp_path / "x")
    assert caught.value.exit_code == 64


def test_a_folder_that_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"manifest\.json is missing"):
        verify(tmp_path)


def test_a_manifest_that_points_outside_reads_nothing_there(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    files = json.loads((artifact / "manifest.json").read_bytes())["files"]
    edit_manifest(artifact, files=[*files, {**files[0], "path": "../../secret"}])
    report = examine(artifact)
    assert report.checked == 0
    assert any("leaves the artifact" in problem for problem in report.problems)
