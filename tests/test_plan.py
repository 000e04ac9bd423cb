"""Keys follow from inputs alone; equal steps are shared; a miss says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.hardware import Hardware, probe
from pipeline.plan import plan
from pipeline.run.status import status
from pipeline.step import Step
from pipeline.store import Store
from tests.fakes import TOOLED, WRITE, Write


def versions(tool: str, toolchain: str) -> str:
    return "1.0"


def chain(text: str) -> tuple[Step, ...]:
    return (
        Step("model", WRITE, Write(text="model"), {}),
        Step("engine", TOOLED, Write(text=text), {"model": "model"}),
    )


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    return probe()


def test_equal_steps_of_two_targets_are_one(hardware: Hardware) -> None:
    made = plan({"a": (chain("x"), hardware), "b": (chain("y"), hardware)}, versions)
    assert [step.label for step in made.steps] == ["model", "a/engine", "b/engine"]
    assert made.targets["a"]["model"] == made.targets["b"]["model"]
    assert made.targets["a"]["engine"] != made.targets["b"]["engine"]
    assert [step.name for step in made.chain(made.targets["b"]["engine"])] == ["model", "engine"]


def test_a_key_is_tagged_whole_and_blind_to_the_targets_name(hardware: Hardware) -> None:
    made = plan({"a": (chain("x"), hardware)}, versions)
    stage, _, digest = made.steps[0].key.partition("-")
    assert (stage, len(digest)) == ("test.write", 64)
    assert made.steps[0].key == plan({"z": (chain("other"), hardware)}, versions).steps[0].key


@pytest.mark.parametrize("change", ["option", "version", "tool", "salt"])
def test_what_a_result_depends_on_changes_the_key(
    hardware: Hardware, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plan({"a": (chain("x"), hardware)}, versions).targets["a"]["engine"]
    if change == "salt":
        monkeypatch.setenv("ENGINEWRIGHT_SALT", "1")
    steps = chain("x2" if change == "option" else "x")
    if change == "version":
        from dataclasses import replace

        steps = (steps[0], replace(steps[1], stage=replace(TOOLED, version=2)))
    after = plan({"a": (steps, hardware)}, lambda t, c: "2.0" if change == "tool" else "1.0").targets["a"]["engine"]
    assert after != before


def test_a_miss_says_what_changed(hardware: Hardware, tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = plan({"a": (chain("x"), hardware)}, versions)
    assert [s.reason for s in status(made, store, {})] == ["not built yet"] * 2
    for step in made.steps:
        with store.locked(step.key), store.adding(step.key, dict(step.key_text), {}) as out:
            (out / "f").write_text("x")
    store.remember("r", {f"a/{name}": key for name, key in made.targets["a"].items()})
    last = store.last("r")
    assert [s.hit for s in status(made, store, last)] == [True, True]

    renewed = plan({"a": (chain("x"), hardware)}, lambda t, c: "2.0")
    assert [(s.hit, s.reason) for s in status(renewed, store, last)] == [(True, ""), (False, "tools.click 1.0 -> 2.0")]
    other = plan({"a": (chain("y"), hardware)}, versions)
    assert [s.reason for s in status(other, store, last)] == ["", "options.text x -> y"]
    (store.path(made.steps[1].key) / "out/f").chmod(0o644)
    (store.path(made.steps[1].key) / "out/f").write_text("changed")
    assert [s.reason for s in status(made, store, last)] == ["", "f has changed"]
    store.remove(made.steps[1].key)
    assert [s.reason for s in status(made, Store(tmp_path), last)] == ["", "its result was removed"]
