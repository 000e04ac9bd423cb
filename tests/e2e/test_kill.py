"""Builds that are cut off: `kill -9` of builder or worker at any moment, Ctrl-C, termination, and two builders at once.

Whatever happened, what is published is whole at every moment, and the next run ends with the same ids.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.e2e.harness import BIN, COPIES, Running, Site, command, environment, refused, wait_for

CHEAP = ("onnx.fused", "onnxruntime.weights", "onnxruntime.parity", "golden")
"""Stages that take less than a second each: all but the reference in torch."""


class Crasher:
    """Runs builds that die at a chosen change of the file system. See crash.py."""

    def __init__(self, folder: Path) -> None:
        self.log = (folder / "crash.log").open("wb")
        self.server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("crash.py"), folder / "told"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            env={**environment(), "PYTHONPATH": str(ROOT)}, text=True,
        )  # fmt: skip

    def run(self, site: Site, *more: object, fatal: int = 0) -> dict[str, int]:
        """One build; its exit code, and how many changes it made if it went well."""
        assert self.server.stdin and self.server.stdout
        places = [str(site.root / "recipe.yaml"), "--cache", str(site.cache), "--out", str(site.out), "-q"]
        self.server.stdin.write(json.dumps({"argv": ["build", *places, *map(str, more)], "fatal": fatal}) + "\n")
        self.server.stdin.flush()
        answer: dict[str, int] = json.loads(self.server.stdout.readline())
        return answer

    def close(self) -> None:
        """End the server."""
        self.server.communicate()
        self.log.close()


@pytest.fixture
def crasher(tmp_path: Path) -> Iterator[Crasher]:
    """A server of one test."""
    server = Crasher(tmp_path)
    yield server
    server.close()


@pytest.fixture
def light(tmp_path: Path) -> Site:
    """A target that copies a model of a few bytes."""
    site = Site.write(tmp_path / "light", COPIES.partition("  two:")[0])
    weights = site.own_model() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return site


def test_a_publication_killed_at_each_of_its_changes(light: Site, crasher: Crasher) -> None:
    """Old and new artifact are in the store: what is killed is the exchange of one for the other."""
    note = ("--set", "targets.one.note=new")
    new = light.made(*note)
    old = light.made()
    whole = crasher.run(light, *note)
    assert whole["changes"] > whole["published"] > 10
    for fatal in range(1, whole["changes"] + 1):
        assert crasher.run(light)["code"] == 0
        assert light.ids() == old
        assert not swept(light)
        done = crasher.run(light, *note, fatal=fatal)
        if done["code"] == 0:  # a link within one tick of the clock changes no time that the store would write down
            assert done["changes"] < fatal and done["published"] == whole["published"]
            assert light.ids() == new
            continue
        assert done["code"] == -signal.SIGKILL
        # Whole at this very moment, before anybody repaired anything.
        found = light.ids()
        assert found.keys() == old.keys()
        assert all(identity in (old[name], new[name]) for name, identity in found.items())
        if fatal % 4 == 0:  # from there to the new one, as to the old one in all other rounds
            assert crasher.run(light, *note)["code"] == 0
            assert light.ids() == new
            assert not swept(light)


def test_a_first_build_killed_at_many_of_its_changes(light: Site, crasher: Crasher) -> None:
    """From an empty store, at a sample of all moments."""
    expected = light.made()
    fresh = Site(light.root, light.root / "fresh", light.root / "fresh-out")
    total = crasher.run(fresh)["changes"]
    for fatal in sorted(random.Random(7).sample(range(1, total + 1), 12)):
        site = Site(light.root, light.root / f"cache{fatal}", light.root / f"out{fatal}")
        assert crasher.run(site, fatal=fatal)["code"] == -signal.SIGKILL
        assert all(expected[name] == identity for name, identity in site.ids().items())
        assert crasher.run(site)["code"] == 0
        assert site.ids() == expected
        assert not swept(site)


def swept(site: Site) -> list[str]:
    """What is left after `cache gc`: a file that was being written when a build was killed waits for it."""
    if site.leftovers():
        assert command("enginewright", "cache", "gc", "--older-than", "1d", "--cache", site.cache).code == 0
    return site.leftovers()


def gone(pids: list[int]) -> bool:
    """Whether none of the processes lives (a zombie does not)."""
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                return False
        except OSError:
            continue
    return True


def test_kill_9_of_the_builder_at_random_moments(ready: Site, tmp_path: Path) -> None:
    site = ready.elsewhere(tmp_path / "site", *CHEAP)
    moments = random.Random(2)
    for _ in range(6):
        build = site.start()
        time.sleep(moments.uniform(0.2, 2.5))
        workers = build.workers()
        build.signal(signal.SIGKILL)
        assert build.end().code in (-signal.SIGKILL, 0)
        wait_for(lambda pids=workers: gone(pids), "the workers die with their builder")
        assert all(ready.ids()[name] == identity for name, identity in site.ids().items())
    assert site.made() == ready.ids()
    assert site.ids() == ready.ids()
    assert not site.leftovers()
    assert command("enginewright", "cache", "verify", "--cache", site.cache).code == 0


def test_kill_9_of_a_worker_at_random_moments(ready: Site, tmp_path: Path) -> None:
    site = ready.elsewhere(tmp_path / "site", *CHEAP)
    moments = random.Random(3)
    killed = 0
    for _ in range(20):
        for entry in (each for stage in CHEAP for each in site.entries(stage)):
            shutil.rmtree(entry)
        build = site.start()
        wait_for(lambda build=build: build.workers() or build.ended, "a worker")
        time.sleep(moments.uniform(0, 0.4))
        for pid in build.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        done = build.end()
        assert not site.leftovers()
        if done.code:
            refused(done, 3, "died of SIGKILL", "memory", "repeat it with: ", "log: ")
            assert site.ids() in ({}, ready.ids())
            killed += 1
        if killed == 4:
            break
    assert killed == 4, "no worker was met alive"
    assert site.made() == ready.ids()
    assert not site.leftovers()


def test_kill_9_of_the_reference(ready: Site, tmp_path: Path) -> None:
    """The one long step, in the middle of torch's work."""
    site = ready.elsewhere(tmp_path / "site", "reference")
    build = site.start()
    (worker,) = wait_for(build.workers, "a worker")
    time.sleep(1.5)
    os.kill(worker, signal.SIGKILL)
    refused(build.end(), 3, "reference: the process died of SIGKILL")
    assert not site.leftovers()
    assert site.ran() == ["reference"]
    assert site.ids() == ready.ids()


def interrupted(build: Running, number: int) -> Any:
    """Send the signal when the first worker is at work; how the build ended, and that no worker lives on."""
    workers = wait_for(build.workers, "a worker")
    time.sleep(0.2)
    build.signal(number)
    done = build.end()
    wait_for(lambda: gone(workers), "the workers end")
    return done


def test_ctrl_c_keeps_what_is_finished(ready: Site, tmp_path: Path) -> None:
    site = ready.elsewhere(tmp_path / "site", "reference", "golden", "onnx.fused")
    started = time.monotonic()
    done = interrupted(site.start("--jobs", "2"), signal.SIGINT)
    assert time.monotonic() - started < 30
    refused(done, 130, "interrupted", "kept")
    assert not site.leftovers()
    assert not site.out.exists()
    assert site.made() == ready.ids()


def test_ctrl_c_on_a_terminal(ready: Site, tmp_path: Path) -> None:
    """The key itself, with the live table of steps."""
    site = ready.elsewhere(tmp_path / "site", "reference")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(site.root)
        os.execve(BIN / "build", site.argv(), {**environment(), "COLUMNS": "50", "TERM": "xterm"})
    shown = b""
    with contextlib.suppress(OSError):  # the terminal ends with its process
        while True:
            shown += os.read(terminal, 1 << 16)
            if b"reference" in shown and not shown.count(b"^C"):
                os.write(terminal, b"\x03")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    text = shown.decode("utf-8", "replace")
    assert "interrupted: finished steps are kept" in text
    assert "Traceback" not in text
    assert text.count("\x1b[?25h") == text.count("\x1b[?25l")  # the cursor is back
    assert not site.leftovers()


def test_termination_is_survived(ready: Site, tmp_path: Path) -> None:
    site = ready.elsewhere(tmp_path / "site", "reference")
    refused(interrupted(site.start(), signal.SIGTERM), 143, "interrupted")
    assert not site.leftovers()
    assert not site.out.exists()
    assert site.ran() == ["reference"]


def test_two_builders_at_once_build_each_step_once(ready: Site, tmp_path: Path) -> None:
    """One store, one place for artifacts."""
    site = ready.elsewhere(tmp_path / "site", *CHEAP)
    missing = len(site.plan())
    builds = [site.start("--events", tmp_path / f"events{number}") for number in range(2)]
    for build in builds:
        done = build.end()
        assert done.code == 0, done.err
    events = [
        json.loads(line) for number in range(2) for line in (tmp_path / f"events{number}").read_text().splitlines()
    ]
    ran = [event["key"] for event in events if event["event"] == "done"]
    assert len(ran) == len(set(ran)) == missing
    assert site.ids() == ready.ids()
    assert not site.leftovers()


def test_what_a_killed_builder_left_is_collected(ready: Site, tmp_path: Path) -> None:
    site = ready.elsewhere(tmp_path / "site", "reference")
    build = site.start()
    workers = wait_for(build.workers, "a worker")
    build.signal(signal.SIGKILL)
    build.end()
    wait_for(lambda: gone(workers), "the worker ends")
    assert len(site.leftovers()) == 1
    assert command("enginewright", "cache", "gc", "--older-than", "1d", "--cache", site.cache).code == 0
    assert not site.leftovers()
    assert site.entries("fetch")


def test_collecting_garbage_beside_a_build_does_it_no_harm(ready: Site, tmp_path: Path) -> None:
    site = ready.elsewhere(tmp_path / "site", *CHEAP)
    build = site.start()
    wait_for(build.workers, "a worker")
    for _ in range(3):
        assert command("enginewright", "cache", "gc", "--cache", site.cache).code == 0
    done = build.end()
    assert done.code == 0, done.err
    assert "corrupt" not in done.err
    assert "reference: started" not in done.err
    assert site.ids() == ready.ids()
    assert command("enginewright", "cache", "gc", "--cache", site.cache).code == 0
    assert not list((site.cache / "results").iterdir())
    assert site.ids() == ready.ids()
