"""The product as its users meet it: the installed commands in processes of their own, in a folder with a recipe.

A `Site` is such a folder, with a store and a place for artifacts. Everything that a test asserts of a build that went
wrong is here too: the exit code, the words, that nothing was published, and that the earlier artifacts are untouched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact.verify import examine
from tests.conftest import ROOT

BIN = Path(sys.executable).parent
MODEL = ROOT / "recipes" / "models" / "pydoc-llama"
DATA = ROOT / "recipes" / "data"

ALL_TARGETS = """\
name: small
version: 1.0.0
model:
  source: model
  license: PSF-2.0
parity:
  data:
    path: heldout.txt
    samples: 2
    length: 64
  prompts: prompts.jsonl
  prompt_count: 2
  new_tokens: 8
targets:
  cpu-fp32:
    runtime: onnxruntime
  cpu-int8:
    runtime: onnxruntime
    precision: int8
  cpu-int4:
    runtime: onnxruntime
    precision: int4
    quantize:
      group_size: 32
"""
COPIES = """\
name: small
model:
  source: model
targets:
  one:
    runtime: copy
  two:
    runtime: copy
    note: another
"""
"""The same spine with a target that costs nothing."""


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    """Exit code; negative: the signal that killed it."""
    out: str
    err: str
    cpu_s: float
    """User and system time of the command and of the children it waited for."""
    wall_s: float

    @property
    def json(self) -> Any:
        """Standard output as one JSON document."""
        return json.loads(self.out)


class Running:
    """A command under way."""

    def __init__(self, argv: list[str], cwd: Path, env: Mapping[str, str] | None, prefix: tuple[str, ...] = ()) -> None:
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  closed by `end`
        self.started = time.monotonic()
        program = str(BIN / argv[0])
        self.process = subprocess.Popen(
            [*prefix, program, *argv[1:]],
            cwd=cwd,
            env={**environment(), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=self.out,
            stderr=self.err,
            preexec_fn=_take_signals,
        )
        self.pid = self.process.pid

    def end(self) -> Done:
        """Wait for it."""
        _, status, usage = os.wait4(self.pid, 0)
        self.process.returncode = code = os.waitstatus_to_exitcode(status)
        texts = []
        for stream in (self.out, self.err):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
            stream.close()
        return Done(code, *texts, usage.ru_utime + usage.ru_stime, time.monotonic() - self.started)

    def workers(self) -> list[int]:
        """Process ids of the steps that it runs now."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (place / "cmdline").read_bytes().split(b"\0")
                if b"pipeline.run.worker" in words and str(self.pid).encode() in words:
                    found.append(int(place.name))
        return found

    def signal(self, number: int) -> None:
        """Send it a signal; it may have ended."""
        os.kill(self.pid, number)  # not reaped before `end`: the number is still its own

    @property
    def ended(self) -> bool:
        """Whether it has."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _take_signals() -> None:
    """A background job of a shell ignores Ctrl-C, and its children inherit that: not these."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def environment() -> dict[str, str]:
    """What a user's shell has, without this test run's own settings."""
    dropped = ("PYTHON", "HF_", "TRANSFORMERS_", "ENGINEWRIGHT_", "GITHUB_", "PYTEST_", "OMP_", "XDG_")
    return {name: value for name, value in os.environ.items() if not name.startswith(dropped)}


def customized(folder: Path, code: str) -> dict[str, str]:
    """The environment in which every Python of a command first runs `code`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def command(
    *argv: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None, prefix: tuple[str, ...] = ()
) -> Done:
    """Run an installed console script to its end."""
    return Running([str(word) for word in argv], cwd, env, prefix).end()


@dataclass(frozen=True)
class Site:
    """A folder with recipe.yaml, a model and data; a store; a folder of artifacts."""

    root: Path
    cache: Path
    out: Path
    env: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def write(cls, root: Path, recipe: str = ALL_TARGETS, **places: Path) -> Site:
        """A new site. The model is a link to the one that ships."""
        root.mkdir(parents=True, exist_ok=True)
        (root / "recipe.yaml").write_text(recipe)
        (root / "model").symlink_to(MODEL)
        (root / "heldout.txt").write_bytes((DATA / "pydoc-heldout.txt").read_bytes()[:4000])
        (root / "prompts.jsonl").write_bytes((DATA / "prompts.jsonl").read_bytes())
        return cls(root, places.get("cache", root / "cache"), places.get("out", root / "out"))

    def own_model(self) -> Path:
        """Make the model a copy that a test may damage."""
        folder = self.root / "model"
        if folder.is_symlink():
            folder.unlink()
            shutil.copytree(MODEL, folder)
        return folder

    def edit(self, old: str, new: str) -> None:
        """Replace a text that the recipe has."""
        text = (self.root / "recipe.yaml").read_text()
        assert old in text
        (self.root / "recipe.yaml").write_text(text.replace(old, new, 1))

    def argv(self, *more: object) -> list[str]:
        """The words of `build`."""
        return ["build", "recipe.yaml", "--cache", str(self.cache), "--out", str(self.out), *map(str, more)]

    def build(self, *more: object, env: Mapping[str, str] | None = None, prefix: tuple[str, ...] = ()) -> Done:
        """`build recipe.yaml` to its end."""
        return command(*self.argv(*more), cwd=self.root, env={**self.env, **(env or {})}, prefix=prefix)

    def start(self, *more: object, env: Mapping[str, str] | None = None) -> Running:
        """`build recipe.yaml`, under way."""
        return Running(self.argv(*more), self.root, {**self.env, **(env or {})})

    def made(self, *more: object, **how: Any) -> dict[str, str]:
        """Build; it must go well. Target -> artifact_id."""
        done = self.build("--format", "json", *more, **how)
        assert done.code == 0, done.err
        return {each["target"]: each["artifact_id"] for each in done.json["targets"]}

    def plan(self, *more: object, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """Step -> the reason for which it has to run, of those that have to."""
        done = self.build("--plan", "--format", "json", *more, env=env)
        assert done.code == 0, done.err
        return {each["step"]: each["reason"] for each in done.json["steps"] if each["state"] == "miss"}

    def ran(self, *more: object, env: Mapping[str, str] | None = None) -> list[str]:
        """Build; it must go well. The steps that ran, in order."""
        with tempfile.NamedTemporaryFile() as events:
            done = self.build("--events", events.name, *more, env=env)
            assert done.code == 0, done.err
            lines = [json.loads(line) for line in Path(events.name).read_text().splitlines()]
        return [event["step"] for event in lines if event["event"] == "done"]

    def ids(self) -> dict[str, str]:
        """Target -> artifact_id of what is published; each must verify."""
        found = {}
        for place in sorted(self.out.glob("*/[!.]*/manifest.json")):
            report = examine(place.parent)
            assert report.ok, report.problems
            assert report.artifact_id == "sha256:" + hashlib.sha256(place.read_bytes()).hexdigest()
            found[place.parent.name] = report.artifact_id
        return found

    def entries(self, stage: str) -> list[Path]:
        """The results of a stage in the store."""
        return sorted((self.cache / "results").glob(f"{stage}-*"))

    def elsewhere(self, root: Path, *without: str) -> Site:
        """A copy of the recipe and of the store, without the results of some stages; nothing is published there."""
        shutil.copytree(self.root, root, symlinks=True, ignore=shutil.ignore_patterns("cache", "out"))
        ignored = shutil.ignore_patterns(*(f"{stage}-*" for stage in without))
        shutil.copytree(self.cache, root / "cache", ignore=ignored)
        return replace(self, root=root, cache=root / "cache", out=root / "out")

    def leftovers(self) -> list[str]:
        """Rubbish of builds that were cut off, in the store and among the artifacts."""
        scratch = self.cache / "scratch"
        found = [path.name for path in scratch.iterdir()] if scratch.is_dir() else []
        return found + [path.name for path in self.out.glob("*/.*") if not path.name.endswith(".lock")]


def refused(done: Done, code: int, *words: str) -> None:
    """The command failed in the way that was meant: exit code and words, and no traceback."""
    assert done.code == code, f"exit code {done.code}\n{done.err}"
    for word in words:
        assert word in done.err, done.err
    assert "Traceback" not in done.err, done.err
    assert "is a bug in enginewright" not in done.err


def snapshot(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Path -> inode, modification time, digest of every file below a folder; the empty files of locks do not count."""
    return {
        path.relative_to(folder).as_posix(): (
            path.stat().st_ino,
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not (path.name.endswith(".lock") and path.stat().st_size == 0)
    }


@contextlib.contextmanager
def untouched(site: Site) -> Iterator[None]:
    """What is published before the block is the same after it, byte for byte, and verifies."""
    before = snapshot(site.out) if site.out.is_dir() else None
    yield
    assert (snapshot(site.out) if site.out.is_dir() else None) == before
    site.ids()


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """What `condition` gives when it is true at last."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)
    return value


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def mounted(place: Path, size_bytes: int) -> Iterator[Path]:
    """A small file system of its own at `place`; the test is skipped where mounting is not allowed."""
    place.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", str(place)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root with CAP_SYS_ADMIN")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def obeying_modes() -> tuple[str, ...]:
    """A prefix that makes a command obey the modes of files, also for root; the test is skipped where there is none."""
    if os.geteuid() != 0:
        return ()
    prefix = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--")
    if not shutil.which("setpriv") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("root ignores the modes of files, and setpriv is not here")
    return prefix
