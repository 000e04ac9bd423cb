"""What the folders of metadata say is what importlib.metadata says."""

from __future__ import annotations

import importlib.metadata
import sys
import zipfile
from pathlib import Path

import pytest

from pipeline import installed
from pipeline.errors import UnavailableError
from pipeline.run import toolchain
from pipeline.targets import GROUP, onnxruntime


def test_versions_are_those_of_importlib() -> None:
    every = {dist.metadata["Name"] for dist in importlib.metadata.distributions()}
    assert {"torch", "onnxruntime", "enginewright"} <= every
    assert {name: installed.version(name) for name in every} == {n: importlib.metadata.version(n) for n in every}


def test_entry_points_are_those_of_importlib() -> None:
    for group in (GROUP, "console_scripts", "pytest11"):
        found = {
            entry.name: entry.value.partition("[")[0].strip() for entry in importlib.metadata.entry_points(group=group)
        }
        assert installed.entry_points(group) == found and found
    assert installed.load(installed.entry_points(GROUP)["onnxruntime"]) is onnxruntime
    assert installed.load("pipeline.errors:UnavailableError.exit_code") == UnavailableError.exit_code
    assert installed.entry_points("nobody's") == {}


def test_names_are_written_in_many_ways(tmp_path: Path) -> None:
    (tmp_path / "Some_Thing.x-1.2+cpu.dist-info").mkdir()
    for name in ("some-thing-x", "Some.Thing_X", "SOME--thing.x"):
        assert installed.version(name, [str(tmp_path / "none"), str(tmp_path)]) == "1.2+cpu"


def test_what_has_no_folder_is_asked_of_importlib(tmp_path: Path) -> None:
    egg = tmp_path / "zipped.egg"
    with zipfile.ZipFile(egg, "w") as archive:
        archive.writestr("zipped-3.4.dist-info/METADATA", "Metadata-Version: 2.1\nName: zipped\nVersion: 3.4\n")
    assert installed.version("zipped", [str(egg)]) == "3.4"
    assert installed.version("zipped") is None and installed.version("zipped", []) is None
    assert installed.version("") is None


def test_the_first_on_the_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, module in (("first", "mine"), ("second", "theirs")):
        metadata = tmp_path / folder / "plug_in-1.dist-info"
        metadata.mkdir(parents=True)
        text = f"# of a test\n[other]\nmine = wrong\n\n[a.group]\nmine = {module}:thing [extra]\n; a remark\n"
        text += "[last]\nmine = wrong\n"
        (metadata / "entry_points.txt").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second")])
    installed.entry_points.cache_clear()
    try:
        assert installed.entry_points("a.group") == {"mine": "mine:thing"}
    finally:
        installed.entry_points.cache_clear()


def test_a_missing_package_is_named() -> None:
    with pytest.raises(UnavailableError, match=r"the package 'no-such-thing' is not installed$"):
        toolchain.version("no-such-thing", "default", {})
