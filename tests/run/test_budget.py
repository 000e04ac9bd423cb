"""What a build takes of a machine: the order of steps, memory, threads, and that Ctrl-C waits for nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.hardware import Hardware, free_memory
from pipeline.plan import Plan
from pipeline.run.budget import Budget, of_host
from pipeline.run.queue import ranks
from pipeline.store import Store
from tests.conftest import ROOT
from tests.fakes import Write
from tests.run.test_local import planned, runner

HOST = Hardware("host", "linux", "x86_64", cores=8, memory_bytes=1 << 34)


def needing(made: Plan, **needs: int) -> Plan:
    """The plan with what steps hold, bytes by name."""
    return replace(made, steps=tuple(replace(step, memory_bytes=needs.get(step.name, 0)) for step in made.steps))


def begun(events: list[object]) -> list[str]:
    return [e["step"].partition("/")[2] for e in events if e["event"] in ("start", "done")]  # type: ignore[index]


def test_what_most_others_wait_for_begins_first_and_ties_keep_the_order_of_the_plan(tmp_path: Path) -> None:
    made = planned(
        alone=(Write(text="a"), {}),
        narrow=(Write(text="n"), {}),
        wide=(Write(text="w"), {}),
        one=(Write(text="1"), {"a": "narrow"}),
        two=(Write(text="2"), {"a": "one"}),
        three=(Write(text="3"), {"a": "wide", "b": "two"}),
        four=(Write(text="4"), {"a": "wide"}),
        five=(Write(text="5"), {"a": "wide"}),
    )
    order = sorted(made.steps, key=lambda step: ranks(made)[step.key])
    assert [step.name for step in order] == ["narrow", "wide", "one", "two", "alone", "three", "four", "five"]
    run, events = runner(tmp_path)
    run.run(made)
    assert begun(events)[::2] == [step.name for step in order]


def test_memory_keeps_steps_apart_and_nobody_overtakes(tmp_path: Path) -> None:
    made = planned(
        first=(Write(text="1", sleep_s=0.3), {}),
        large=(Write(text="2"), {}),
        small=(Write(text="3"), {}),
    )
    made = needing(made, first=60, large=50, small=1)
    run, events = runner(tmp_path, budget=Budget(jobs=3, cores=3, memory_bytes=100))
    run.run(made)
    assert begun(events)[:2] == ["first", "first"]
    assert set(begun(events)[2:4]) <= {"large", "small"}


def test_a_step_larger_than_the_budget_runs_alone(tmp_path: Path) -> None:
    made = needing(planned(a=(Write(text="a"), {}), b=(Write(text="b"), {})), a=500, b=500)
    run, events = runner(tmp_path, budget=Budget(jobs=2, memory_bytes=100))
    run.run(made)
    assert begun(events) == ["a", "a", "b", "b"]


def test_threads_are_divided_among_the_steps_that_run(tmp_path: Path) -> None:
    """Two side by side get half each; the one that then runs alone gets all."""
    made = planned(
        a=(Write(text="", threads=True), {}),
        b=(Write(text=" ", threads=True), {}),
        c=(Write(text="  ", threads=True), {"1": "a", "2": "b"}),
    )
    run, _ = runner(tmp_path, budget=Budget(jobs=2, cores=6))
    done = run.run(made)
    told = {step.name: (done[step.key].out / "threads").read_text() for step in made.steps}
    assert told == {"a": "3", "b": "3", "c": "6"}


def test_the_budget_of_a_host() -> None:
    assert of_host(HOST).jobs == 8
    assert of_host(HOST, jobs=2, memory_bytes=7) == Budget(jobs=2, cores=8, memory_bytes=7)
    assert of_host(HOST, threads="3,1").cores == 3
    assert of_host(HOST, threads="64").cores == 8
    assert of_host(HOST, threads="no").cores == 8
    assert Budget(cores=2).threads(5) == 1


@pytest.mark.parametrize(
    ("group", "free"),
    [
        ({}, 8 << 30),
        ({"memory.max": "max", "memory.current": "5"}, 8 << 30),
        ({"memory.max": str(3 << 30), "memory.current": str(1 << 30)}, 2 << 30),
        (
            {"memory.max": str(3 << 30), "memory.current": str(3 << 30), "memory.stat": f"inactive_file {1 << 30}"},
            1 << 30,
        ),
    ],
)
def test_free_memory_is_within_the_cgroup(tmp_path: Path, group: dict[str, str], free: int) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {16 << 20} kB\nMemAvailable: {8 << 20} kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    (tmp_path / "sys/fs/cgroup/job").mkdir(parents=True)
    for name, text in group.items():
        (tmp_path / "sys/fs/cgroup/job" / name).write_text(text + "\n")
    assert free_memory(tmp_path) == free


def test_ctrl_c_does_not_wait_for_another_builder(tmp_path: Path) -> None:
    """The step's lock is held elsewhere: the build ends at once, and the next one goes on."""
    made = planned(a=(Write(text="a"), {}))
    code = (
        "import pathlib\n"
        "from tests.run.test_local import planned, runner\n"
        "from tests.fakes import Write\n"
        f"runner(pathlib.Path({str(tmp_path)!r}))[0].run(planned(a=(Write(text='a'), {{}})))\n"
    )
    store = Store(tmp_path)
    with store.locked(made.steps[0].key):
        builder = subprocess.Popen(
            [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + code],
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        threading.Event().wait(1.5)
        builder.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert builder.wait(30) != 0
        assert time.monotonic() - started < 20
    assert runner(tmp_path)[0].run(made)[made.steps[0].key].out.is_dir()
