"""Steps run in child processes: what they fail of is told, and nothing half-made is kept."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EnginewrightError, StageError, UnavailableError
from pipeline.hardware import probe
from pipeline.plan import Plan, plan
from pipeline.run.budget import Budget
from pipeline.run.local import Runner
from pipeline.run.once import Event
from pipeline.step import Step
from pipeline.store import Store
from tests.conftest import ROOT
from tests.fakes import WRITE, Write


def planned(**steps: tuple[Write, dict[str, str]]) -> Plan:
    chain = tuple(Step(name, WRITE, options, needs) for name, (options, needs) in steps.items())
    return plan({"t": (chain, probe())}, lambda tool, toolchain: "1")


def runner(root: Path, **more: Any) -> tuple[Runner, list[Event]]:
    events: list[Event] = []
    return Runner(Store(root), events.append, {}, **more), events


def test_a_chain_runs_once_and_then_is_a_hit(tmp_path: Path) -> None:
    made = planned(a=(Write(text="a"), {}), b=(Write(text="b"), {"first": "a"}))
    run, events = runner(tmp_path)
    done = run.run(made)
    assert (done[made.targets["t"]["b"]].out / "text").read_text() == "ab"
    assert [(e["event"], e["step"]) for e in events if e["event"] != "progress"] == [
        ("start", "t/a"), ("done", "t/a"), ("start", "t/b"), ("done", "t/b"),
    ]  # fmt: skip
    assert {
        "event": "progress",
        "step": "t/a",
        "key": made.steps[0].key,
        "done": 1,
        "total": 2,
        "note": "half-way",
    } in events
    finished = next(e for e in events if e["event"] == "done")
    assert finished["cpu_s"] > 0
    assert finished["peak_rss_bytes"] > 1e6
    again, events = runner(tmp_path)
    again.run(made)
    assert [e["event"] for e in events] == ["hit", "hit"]


def test_independent_steps_run_side_by_side(tmp_path: Path) -> None:
    made = planned(a=(Write(text="a", sleep_s=1.0), {}), b=(Write(text="b", sleep_s=1.0), {}))
    run, events = runner(tmp_path, budget=Budget(jobs=2, cores=2))
    run.run(made)
    assert [e["event"] for e in events if e["event"] != "progress"] == ["start", "start", "done", "done"]


@pytest.mark.parametrize(
    ("fail", "error", "text"),
    [
        ("bug", StageError, "ZeroDivisionError: a bug"),
        ("kill", StageError, "SIGKILL"),
        ("segv", StageError, "SIGSEGV"),
        ("enospc", StageError, "no space left"),
        ("hidden enospc", StageError, "no space left"),
        ("unavailable", UnavailableError, "this needs a thing"),
    ],
)
def test_a_failure_keeps_its_kind_and_names_the_command_that_repeats_it(
    tmp_path: Path, fail: str, error: type[EnginewrightError], text: str
) -> None:
    made = planned(a=(Write(text="a"), {}), b=(Write(text="b", fail=fail), {"first": "a"}))
    run, _ = runner(tmp_path)
    with pytest.raises(error, match=text) as caught:
        run.run(made)
    store = Store(tmp_path)
    assert store.get(made.targets["t"]["a"]) is not None
    assert store.get(made.targets["t"]["b"]) is None
    assert not list((tmp_path / "scratch").iterdir())
    command = next(line for line in caught.value.hint.splitlines() if line.startswith("repeat it with: "))
    again = subprocess.run(
        shlex.split(command.removeprefix("repeat it with: ")),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},  # where the stage of this test is
    )
    assert again.returncode == (-9 if fail == "kill" else -11 if fail == "segv" else error.exit_code)
    if fail == "bug":
        assert "ZeroDivisionError" in again.stderr


def test_what_a_step_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    """A process that a step forked holds the builder's pipe."""
    made = planned(a=(Write(text="a", fail="orphan"), {}))
    started = time.monotonic()
    with pytest.raises(StageError, match="SIGKILL"):
        runner(tmp_path)[0].run(made)
    assert time.monotonic() - started < 20


def test_a_corrupt_input_is_built_again_before_it_is_used(tmp_path: Path) -> None:
    made = planned(a=(Write(text="a"), {}), b=(Write(text="b"), {"first": "a"}))
    runner(tmp_path)[0].run(made)
    store = Store(tmp_path)
    store.remove(made.targets["t"]["b"])
    file = store.path(made.targets["t"]["a"]) / "out/text"
    file.chmod(0o644)
    file.write_text("z")
    run, events = runner(tmp_path)
    done = run.run(made)
    assert (done[made.targets["t"]["b"]].out / "text").read_text() == "ab"
    assert [e["event"] for e in events if e["event"] == "corrupt"] == ["corrupt"]


def test_two_builders_at_once_build_each_step_once(tmp_path: Path) -> None:
    made = planned(a=(Write(text="a", sleep_s=0.5), {}), b=(Write(text="b"), {"first": "a"}))
    runs = [runner(tmp_path) for _ in range(2)]
    threads = [threading.Thread(target=run.run, args=(made,)) for run, _ in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    started = [e["step"] for _, events in runs for e in events if e["event"] == "start"]
    assert sorted(started) == ["t/a", "t/b"]


@pytest.mark.parametrize("victim", ["builder", "worker"])
def test_kill_9_is_survived(tmp_path: Path, victim: str) -> None:
    code = (
        "import pathlib, sys\n"
        "from tests.run.test_local import planned, runner\n"
        "from tests.fakes import Write\n"
        "made = planned(a=(Write(text='a'), {}), b=(Write(text='b', sleep_s=60), {'first': 'a'}))\n"
        f"run, events = runner(pathlib.Path({str(tmp_path)!r}))\n"
        "run.run(made)\n"
    )
    builder = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not (workers := worker_of(builder.pid, "test.write")) or not list((tmp_path / "results").glob("*")):
        assert time.time() < deadline, "the second step never started"
        time.sleep(0.05)
    os.kill(builder.pid if victim == "builder" else workers[0], signal.SIGKILL)
    assert builder.wait(timeout=30) != 0
    while worker_of(builder.pid, "test.write"):
        assert time.time() < deadline, "the worker outlived its builder"
        time.sleep(0.05)
    made = planned(a=(Write(text="a"), {}), b=(Write(text="b"), {"first": "a"}))
    done = runner(tmp_path)[0].run(made)
    assert (done[made.targets["t"]["b"]].out / "text").read_text() == "ab"


def worker_of(builder: int, key: str) -> list[int]:
    """Processes that run a step of `key` for the process `builder`."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (place / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "pipeline.run.worker" in arguments and str(builder) in arguments and any(key in a for a in arguments):
            found.append(int(place.name))
    return found
