"""The other commands, with what users give them by mistake; and artifacts that were tampered with."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.harness import COPIES, Site, command, customized, obeying_modes, refused

VERBS: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "misspelt": (("buld",), 64, ("Did you mean 'build'?",)),
    "verify nothing": (("verify", "nothing"), 64, ("nothing does not exist", "manifest.json")),
    "verify a file": (("verify", "recipe.yaml"), 64, ("recipe.yaml is a file",)),
    "verify a model": (("verify", "model"), 6, ("manifest.json is missing",)),
    "inspect nothing": (("inspect", "nothing"), 64, ("nothing does not exist",)),
    "inspect a model": (("inspect", "model"), 6, ("manifest.json is missing",)),
    "generate with nothing": (("generate", "nothing", "-p", "hi"), 64, ("nothing is not a folder", "of an artifact")),
    "generate with a model": (("generate", "model", "-p", "hi"), 64, ("neither manifest.json nor engine.json",)),
    "generate with a copy": (("generate", "copied", "-p", "hi"), 5, ("a copy",)),
    "verify a whole build": (("verify", "built"), 64, ("built holds artifacts", "built/one")),
    "generate with a whole build": (("generate", "built", "-p", "hi"), 64, ("built holds artifacts", "built/one")),
    "doctor of no recipe": (("doctor", "nothing.yaml"), 5, ("there is no file nothing.yaml",)),
    "init of nothing": (("init", "nothing", "-o", "new.yaml"), 64, ("there is no folder nothing",)),
    "cache at a file": (("cache", "ls", "--cache", "recipe.yaml"), 5, ("is a file", "--cache")),
    "cache by a wrong size": (("cache", "gc", "--max-size", "20 apples"), 64, ("'20 apples' is not a size",)),
    "cache by a wrong age": (("cache", "gc", "--older-than", "soon"), 64, ("'soon' is not a duration",)),
    "an unknown toolchain": (("toolchain", "install", "nothing"), 5, ("no toolchain is called 'nothing'",)),
}


@pytest.mark.parametrize("name", VERBS)
def test_a_mistake(copies: Site, tmp_path: Path, name: str) -> None:
    argv, code, words = VERBS[name]
    site = Site.write(tmp_path / "site", COPIES)
    (site.root / "copied").symlink_to(copies.out / "small" / "one")
    (site.root / "built").symlink_to(copies.out / "small")
    env = {"ENGINEWRIGHT_CACHE": str(tmp_path / "cache")}
    done = command("enginewright", *argv, cwd=site.root, env=env)
    refused(done, code, *words)


@pytest.mark.parametrize("argv", [("verify",), ("verify", "--run"), ("generate", "-p", "hi")], ids=" ".join)
def test_an_artifact_with_one_byte_changed_is_not_used(ready: Site, tmp_path: Path, argv: tuple[str, ...]) -> None:
    artifact = shutil.copytree(ready.out / "small" / "cpu-int4", tmp_path / "artifact")
    weights = artifact / "model.onnx"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    done = command("enginewright", argv[0], artifact, *argv[1:])
    refused(done, 6, "model.onnx: has other contents", "do not use it")
    assert done.out == ""


@pytest.mark.parametrize("change", ["added", "linked", "missing", "manifest"])
def test_an_artifact_that_is_not_what_its_manifest_says(copies: Site, tmp_path: Path, change: str) -> None:
    artifact = shutil.copytree(copies.out / "small" / "one", tmp_path / "artifact")
    manifest = artifact / "manifest.json"
    if change == "added":
        (artifact / "sitecustomize.py").write_text("")
    elif change == "linked":
        (artifact / "passwords").symlink_to("/etc/passwd")
    elif change == "missing":
        (artifact / "config.json").unlink()
    else:
        text = manifest.read_text()
        manifest.unlink()
        manifest.write_text(text.replace('"small"', '"large"'))
    done = command("enginewright", "verify", artifact)
    if change == "manifest":  # another manifest is another artifact: its id, and what was said of the old one, tell
        assert done.code == 6 or copies.ids()["one"] not in done.out
    else:
        refused(done, 6, {"added": "sitecustomize.py", "linked": "passwords", "missing": "config.json"}[change])


def test_a_recipe_in_a_folder_that_cannot_be_written(copies: Site, tmp_path: Path) -> None:
    """The lock cannot be written: for a local model that is a note, not an error."""
    site = Site.write(tmp_path / "site", COPIES, cache=copies.cache, out=tmp_path / "out")
    prefix = obeying_modes()
    site.root.chmod(0o555)
    try:
        done = site.build(prefix=prefix)
    finally:
        site.root.chmod(0o755)
    refused(done, 0, "note: recipe.lock cannot be written")
    assert site.ids() == copies.ids()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_that_may_not_be_read(copies: Site, tmp_path: Path, name: str) -> None:
    site = Site.write(tmp_path / "site", COPIES)
    (site.own_model() / name).chmod(0)
    refused(site.build(prefix=obeying_modes()), 64, name, "ermission")
    assert not site.out.exists()


def test_a_long_name_is_refused_before_the_work(copies: Site, tmp_path: Path) -> None:
    site = replace(copies, out=tmp_path / "out")
    refused(site.build("--set", f"name={'long' * 80}"), 64, "name has 320 characters", "100 characters at most")
    assert not site.out.exists()


def test_modules_in_the_working_directory_are_not_ours(copies: Site, tmp_path: Path) -> None:
    """`pipeline/` is what many call a folder of their own."""
    site = Site.write(tmp_path / "site", COPIES)
    for name in ("pipeline/__init__", "json", "numpy", "click", "tokenizers", "sitecustomize"):
        place = site.root / f"{name}.py"
        place.parent.mkdir(exist_ok=True)
        place.write_text("raise SystemExit('a module of the user was imported')\n")
    assert site.made() == copies.ids()
    assert command("enginewright", "verify", site.out / "small" / "one", cwd=site.root).code == 0


def test_a_user_without_a_name_or_a_home(copies: Site, tmp_path: Path) -> None:
    """A container with a bare user number."""
    nobody = "import pwd\n\ndef nobody(number):\n    raise KeyError(number)\n\npwd.getpwuid = nobody\n"
    env = customized(tmp_path / "custom", nobody)
    prefix = ("env", "-u", "HOME", "-u", "USER", "-u", "LOGNAME")
    site = Site.write(tmp_path / "site", COPIES)
    assert site.made(env=env, prefix=prefix) == copies.ids()
    done = command("build", "recipe.yaml", cwd=site.root, env=env, prefix=prefix)
    refused(done, 5, "no home directory", "ENGINEWRIGHT_CACHE")


def test_a_recipe_of_another_folder(ready: Site, tmp_path: Path) -> None:
    """Paths are relative to the recipe, not to where the command runs; the artifacts go where it runs."""
    done = command("build", ready.root / "recipe.yaml", "--cache", ready.cache, cwd=tmp_path)
    assert done.code == 0, done.err
    assert replace(ready, out=tmp_path / "artifacts").ids() == ready.ids()


def test_an_output_on_another_file_system_is_a_copy_and_then_unchanged(ready: Site) -> None:
    """/dev/shm is one on most systems; where it is not, this is the ordinary case."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        site = replace(ready, out=Path(place) / "out")
        assert site.made() == ready.ids()
        assert site.build().out.count("(unchanged)") == 3
        assert site.ids() == ready.ids()
