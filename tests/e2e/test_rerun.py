"""What changed is built again, what did not is not, and --plan says why."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.e2e.harness import Site, refused, untouched

GROUP = ("--set", "targets.cpu-int4.quantize.group_size=64")


def test_one_option_reruns_what_depends_on_it(ready: Site, tmp_path: Path) -> None:
    site = ready.elsewhere(tmp_path / "site")
    before = site.made()
    assert site.plan(*GROUP) == {
        "cpu-int4/engine": "options.group_size 32 -> 64",
        "cpu-int4/parity": "engine changed",
    }
    assert site.ran(*GROUP) == ["cpu-int4/engine", "cpu-int4/parity"]
    after = site.ids()
    assert after["cpu-int4"] != before["cpu-int4"]
    assert (after["cpu-fp32"], after["cpu-int8"]) == (before["cpu-fp32"], before["cpu-int8"])
    # Both are in the store now: the way back costs nothing.
    assert site.ran() == []
    assert site.ids() == before


def test_the_recipe_edited_is_the_recipe_overridden(ready: Site, tmp_path: Path) -> None:
    site = ready.elsewhere(tmp_path / "site")
    overridden = site.made(*GROUP)
    site.edit("group_size: 32", "group_size: 64")
    assert site.ran() == []
    assert site.ids() == overridden


@pytest.mark.parametrize(
    ("override", "reason", "again"),
    [
        ("parity.new_tokens=4", "options.new_tokens 8 -> 4", {"reference", "golden", "parity"}),
        ("package.golden=1", "options.count 2 -> 1", {"golden"}),
        ("model.license=MIT", "", set()),
        ("targets.cpu-fp32.gates.kld_mean=0.5", "", set()),
    ],
)
def test_each_change_reaches_as_far_as_it_must(ready: Site, override: str, reason: str, again: set[str]) -> None:
    plan = ready.plan("--set", override)
    assert kinds(plan) == again
    assert not reason or reason in plan.values()


def test_a_changed_weight_reruns_all_that_rests_on_the_model(ready: Site, tmp_path: Path) -> None:
    site = ready.elsewhere(tmp_path / "site")
    weights = site.own_model() / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    plan = site.plan()
    assert "model.safetensors" in plan["model"] or "options.files" in plan["model"]
    assert plan["reference"] == "model changed"
    assert not {"prompts", "parity-data"} & plan.keys()
    refused(site.build("--locked", "--plan"), 64, "model.safetensors", "--locked")


def pretend(folder: Path, distribution: str, version: str) -> dict[str, str]:
    """An environment in which a distribution says that it has another version."""
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    return {"PYTHONPATH": str(folder)}


def kinds(steps: Iterable[str]) -> set[str]:
    """`cpu-int4/parity.unquantized` -> `parity`."""
    return {step.rpartition("/")[2].partition(".")[0] for step in steps}


@pytest.mark.parametrize(
    ("tool", "again"),
    [
        ("onnxruntime", {"parity"}),
        ("onnx", {"export", "engine", "parity"}),
        ("transformers", {"reference", "golden", "parity"}),
        ("click", set()),
    ],
)
def test_another_version_of_a_tool_reruns_what_uses_it(ready: Site, tmp_path: Path, tool: str, again: set[str]) -> None:
    plan = ready.plan(env=pretend(tmp_path / "site", tool, "99.1"))
    assert kinds(plan) == again
    reason = f"tools.{tool} {importlib.metadata.version(tool)} -> 99.1"
    assert any(reason in why for why in plan.values()) == bool(again)


def test_another_runtime_version_is_measured_again_and_the_engine_kept(ready: Site, tmp_path: Path) -> None:
    site = ready.elsewhere(tmp_path / "site")
    before = site.made()
    env = pretend(tmp_path / "tools", "onnxruntime", "99.1")
    assert kinds(site.ran("--target", "cpu-int4", env=env)) == {"parity"}
    assert site.ids() == before


def test_plan_runs_nothing_and_says_by_its_exit_code_whether_there_is_work(ready: Site, tmp_path: Path) -> None:
    with untouched(ready):
        assert ready.build("--plan", "--detailed-exitcode").code == 0
        assert ready.build("--plan", "--detailed-exitcode", *GROUP).code == 2
        assert ready.build("--plan", *GROUP).code == 0
        wrong = ready.build("--plan", "--detailed-exitcode", "--set", "nmae=x")
        refused(wrong, 1, "unknown field 'nmae'")
    fresh = Site.write(tmp_path / "site")
    done = fresh.build("--plan", "--detailed-exitcode")
    assert done.code == 2
    steps = done.out.count("not built yet")
    assert steps > 5
    assert f"{steps} of {steps} steps to run" in done.out
    assert not (fresh.cache / "results").exists()


def test_one_target_alone(ready: Site, tmp_path: Path) -> None:
    site = Site(ready.root, ready.cache, tmp_path / "out")
    assert site.made("--target", "cpu-int8") == {"cpu-int8": ready.ids()["cpu-int8"]}
    assert set(site.ids()) == {"cpu-int8"}


def test_the_reason_for_a_removed_result(ready: Site, tmp_path: Path) -> None:
    site = ready.elsewhere(tmp_path / "site", "onnx.fused")
    assert site.plan() == {"export": "its result was removed"}


def test_a_build_after_a_build_notes_nothing(ready: Site, tmp_path: Path) -> None:
    """Every record is as the first build left it: what differs is hashed, and noted."""
    site = ready.elsewhere(tmp_path / "site")
    site.made()
    records = sorted((site.cache / "results").glob("*/entry.json"))
    before = [record.stat().st_mtime_ns for record in records]
    assert len(records) > 5
    site.made()
    assert [record.stat().st_mtime_ns for record in records] == before
