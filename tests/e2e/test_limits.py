"""Disk full, store or output that cannot be written, too little memory, a backend that is not installed."""

from __future__ import annotations

import contextlib
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline import hardware
from pipeline.cli import build as build_command
from pipeline.errors import UnavailableError
from tests.e2e.harness import Site, command, customized, mounted, obeying_modes, refused, size_of, untouched


def without_estimate(folder: Path) -> dict[str, str]:
    """An environment in which the estimate refuses no build: what comes when it was too low is the point."""
    code = (
        "import importlib.abc, importlib.util, sys\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name != 'pipeline.cli.preflight': return None\n"
        "        sys.meta_path.remove(self)\n"
        "        spec = importlib.util.find_spec(name)\n"
        "        run = spec.loader.exec_module\n"
        "        def patched(module):\n"
        "            run(module)\n"
        "            module.disk = lambda prepared, steps: 0\n"
        "        spec.loader.exec_module = patched\n"
        "        return spec\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    return customized(folder, code)


def test_a_disk_that_is_too_small_is_refused_before_anything_runs(ready: Site, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", 4 << 20) as place, untouched(ready):
        site = replace(ready, cache=place / "cache")
        done = site.build()
        refused(done, 3, "no space", str(place), "the build needs about", "--cache DIR", "cache gc")
        assert "started" not in done.err
        assert re.search(r"4\.\d MB free on the disk .* needs about \d\d\.\d MB", done.err)
        assert not list((place / "cache").glob("results/*"))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_disk_that_fills_up_in_the_middle(ready: Site, tmp_path: Path, share: float) -> None:
    """At the fetch, and in two stages that write large files; what was finished stays, what was not leaves nothing."""
    size_bytes = int(size_of(ready.cache / "results") * share)
    with mounted(tmp_path / "small", size_bytes) as place, untouched(ready):
        site = replace(ready, cache=place / "cache")
        for kept in ("reference", "golden"):  # torch's part is not the point
            for entry in ready.entries(kept):
                shutil.copytree(entry, site.cache / "results" / entry.name)
        done = site.build(env=without_estimate(tmp_path / "custom"))
        refused(done, 3, "no space left", str(place))
        assert re.search(r"needs about [\d.]+ MB|[\d,]+ bytes needed|not even what belongs", done.err)
        assert "free some space" in done.err
        assert not site.leftovers()
        done = command("enginewright", "cache", "verify", "--cache", site.cache)
        assert done.code == 0, done.out


def test_an_output_disk_that_is_too_small(ready: Site, tmp_path: Path) -> None:
    fp32, int8 = (size_of(ready.out / "small" / name) for name in ("cpu-fp32", "cpu-int8"))
    with mounted(tmp_path / "small", fp32 + int8 // 2 + (1 << 20)) as place:
        site = replace(ready, out=place / "out")
        assert site.made("--target", "cpu-fp32") == {"cpu-fp32": ready.ids()["cpu-fp32"]}
        with untouched(site):
            done = site.build()
            refused(done, 3, "no space left at", str(place / "out"), "needs up to", "MB", "--out")
            assert not [name for name in site.leftovers() if "assembling" in name]
        assert site.ids() == {"cpu-fp32": ready.ids()["cpu-fp32"]}


def test_a_store_that_is_full_is_still_a_store(ready: Site, tmp_path: Path) -> None:
    """With not a byte left, what is built already is found and published."""
    with mounted(tmp_path / "full", 100 << 20) as place:
        site = ready.elsewhere(tmp_path / "site")
        shutil.copytree(site.cache, place / "cache")
        with contextlib.suppress(OSError), (place / "filler").open("wb") as filler:
            while filler.write(bytes(1 << 16)):
                pass
        full = replace(site, cache=place / "cache")
        assert full.made() == ready.ids()
        assert full.plan() == {}


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """No directory below a folder can be written."""
    places = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    modes = {place: place.stat().st_mode for place in places}
    for place in reversed(places):
        place.chmod(0o555)
    try:
        yield
    finally:
        for place in places:
            place.chmod(modes[place])


def test_a_read_only_store_serves_what_it_has(ready: Site, tmp_path: Path) -> None:
    prefix = obeying_modes()
    site = ready.elsewhere(tmp_path / "site")
    with read_only(site.cache):
        assert site.made(prefix=prefix) == ready.ids()
        with untouched(site):
            done = site.build("--set", "targets.cpu-int4.quantize.group_size=64", prefix=prefix)
            refused(done, 3, str(site.cache), "cannot be written", "--cache DIR", "ENGINEWRIGHT_CACHE")
        refused(replace(site, cache=site.cache / "new").build(prefix=prefix), 3, str(site.cache / "new"))


def test_a_store_on_a_read_only_file_system(ready: Site, tmp_path: Path) -> None:
    with mounted(tmp_path / "mount", 100 << 20) as place:
        site = ready.elsewhere(tmp_path / "site")
        shutil.copytree(site.cache, place / "cache")
        site = replace(site, cache=place / "cache")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        assert site.made() == ready.ids()
        done = site.build("--set", "targets.cpu-int4.quantize.group_size=64")
        refused(done, 3, str(site.cache), "cannot be written: Read-only file system")


def test_an_output_that_cannot_be_written(copies: Site, tmp_path: Path) -> None:
    prefix = obeying_modes()
    site = replace(copies.elsewhere(tmp_path / "site"), out=tmp_path / "locked" / "out")
    (tmp_path / "locked").mkdir(mode=0o555)
    refused(site.build(prefix=prefix), 3, str(tmp_path / "locked"), "--out")
    # Where nothing is built yet it is said before the work, not after it.
    done = replace(site, cache=tmp_path / "empty").build(prefix=prefix)
    refused(done, 3, str(tmp_path / "locked"), "--out")
    assert "started" not in done.err
    (tmp_path / "locked").chmod(0o755)
    assert site.made(prefix=prefix) == copies.ids()


def test_an_artifact_that_is_up_to_date_may_be_read_only(copies: Site, tmp_path: Path) -> None:
    prefix = obeying_modes()
    site = copies.elsewhere(tmp_path / "site")
    before = site.made()
    with read_only(site.out), untouched(site):
        assert site.made(prefix=prefix) == before
        done = site.build("--set", "targets.one.note=x", prefix=prefix)
        refused(done, 3, "cannot be written", "--out")


@pytest.mark.parametrize("place", ["", "small", "small/one"])
def test_an_output_in_whose_place_a_file_lies(copies: Site, tmp_path: Path, place: str) -> None:
    site = replace(copies, out=tmp_path / "out")
    (site.out / place).parent.mkdir(parents=True, exist_ok=True)
    (site.out / place).write_text("mine")
    for cache in (copies.cache, tmp_path / "empty"):
        refused(replace(site, cache=cache).build(), 3, str(site.out), "--out")
        assert (site.out / place).read_text() == "mine"
    assert not (tmp_path / "empty" / "results").exists()


def test_somebodys_folder_is_not_replaced(copies: Site, tmp_path: Path) -> None:
    site = replace(copies, out=tmp_path / "out")
    thesis = site.out / "small" / "two" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    for cache in (copies.cache, tmp_path / "empty"):
        done = replace(site, cache=cache).build()
        refused(done, 3, str(thesis.parent), "not an artifact", "another --out")
    assert thesis.read_text() == "years of work"
    assert not site.ids()
    assert not (tmp_path / "empty" / "results").exists()


def test_a_file_in_the_place_of_the_store(copies: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with untouched(copies):
        refused(replace(copies, cache=tmp_path / "file").build(), 5, "is a file", "--cache")
        refused(replace(copies, cache=tmp_path / "file" / "below").build(), 5, "is a file", "--cache")


def test_too_little_memory_is_refused_before_anything_runs(
    ready: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(hardware.probe(), memory_bytes=20_000_000)
    monkeypatch.setattr(build_command, "probe", lambda: small)
    site = replace(ready, cache=tmp_path / "cache")
    with untouched(ready):
        result = CliRunner().invoke(build_command.build, [str(site.root / "recipe.yaml"), *site.argv()[2:]])
    assert isinstance(result.exception, UnavailableError)
    assert result.exception.exit_code == 5
    assert "this host has 20.0 MB of memory" in result.exception.message
    assert "needs about" in result.exception.message
    assert not (site.cache / "results").exists()


@pytest.mark.parametrize("limit", [300, 500])
def test_memory_that_runs_out_in_a_step(ready: Site, tmp_path: Path, limit: int) -> None:
    """However torch meets the limit of its address space (in MiB), it is the step that ends, and the build says so."""
    site = ready.elsewhere(tmp_path / "site", "reference")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit << 20, before[1]))
    try:
        build = site.start()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    done = build.end()
    refused(done, 3, "reference: ", "repeat it with: ", "log: ", f"{(limit << 20) / 1e6:.0f} MB (`ulimit -v`)")
    assert not site.leftovers()
    assert not site.out.exists()


HIDDEN = """\
import importlib.abc, os, sys

hidden = {names!r}

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
seen = os.listdir

def listdir(path="."):
    return [name for name in seen(path) if not (name.endswith(".dist-info") and name.partition("-")[0] in hidden)]

os.listdir = listdir
"""


@pytest.mark.parametrize("module", ["onnxruntime", "torch", "onnx", "transformers"])
def test_a_backend_that_is_not_installed(ready: Site, tmp_path: Path, module: str) -> None:
    env = customized(tmp_path / "custom", HIDDEN.format(names=(module,)))
    with untouched(ready):
        done = ready.build(env=env)
        refused(done, 5, f"the package {module!r} is not installed", "pip install 'enginewright[onnxruntime]'")
        assert "started" not in done.err
    done = command("enginewright", "doctor", env=env)
    assert "Traceback" not in done.err
    assert module in done.out


def test_what_needs_no_backend_works_without_one(copies: Site, tmp_path: Path) -> None:
    code = HIDDEN.format(names=("torch", "onnx", "onnxruntime", "transformers", "numpy"))
    env = customized(tmp_path / "custom", code)
    assert copies.made(env=env) == copies.ids()
    artifact = copies.out / "small" / "one"
    assert command("enginewright", "verify", artifact, env=env).code == 0
    assert command("enginewright", "inspect", artifact, env=env).code == 0


def test_a_toolchain_that_is_not_installed(ready: Site, tmp_path: Path) -> None:
    with untouched(ready):
        done = ready.build("--set", "targets.cpu-fp32.exporter=optimum", env={"ENGINEWRIGHT_CACHE": str(tmp_path)})
        refused(done, 5, "optimum")
