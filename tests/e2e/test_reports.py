"""What a build tells to programs: JSON, events, JUnit, GitHub's files; and where they cannot be written."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.e2e.harness import Done, Site, obeying_modes, refused, untouched


def test_one_json_document_on_standard_output(shipped: tuple[Done, Site]) -> None:
    done, site = shipped
    document = json.loads(done.out)
    assert (document["recipe"], document["version"]) == ("pydoc-llama", "1.0.0")
    for each in document["targets"]:
        assert Path(each["artifact"]) == site.out / "pydoc-llama" / each["target"]
        assert each["changed"] is True
        assert each["metrics"]
    assert done.err == ""


def test_events_are_one_json_object_a_line(shipped: tuple[Done, Site]) -> None:
    _, site = shipped
    events = [json.loads(line) for line in (site.out.parent / "events").read_text().splitlines()]
    assert {"start", "progress", "done", "result"} >= {event["event"] for event in events}
    started = [event["step"] for event in events if event["event"] == "start"]
    ended = [event["step"] for event in events if event["event"] == "done"]
    assert sorted(started) == sorted(ended)  # steps run side by side: those that began first need not end first
    assert len(set(started)) == len(started)
    assert started.count("export") == 1
    assert all(
        [event["event"] for event in events if event.get("step") == step and event["event"] != "progress"]
        == ["start", "done"]
        for step in started
    )
    for event in events:
        if event["event"] == "done":
            assert event["cpu_s"] > 0
            assert event["peak_rss_bytes"] > 1e6
            assert event["size_bytes"] > 0
    times = [event["time_s"] for event in events if "time_s" in event]
    assert times == sorted(times)
    assert events[-1]["event"] == "result"


def test_junit_has_a_suite_a_target_and_a_case_a_gate(shipped: tuple[Done, Site]) -> None:
    done, site = shipped
    root = ElementTree.parse(site.out.parent / "gates.xml").getroot()
    suites = {suite.get("name"): suite for suite in root}
    assert set(suites) == {f"pydoc-llama/{name}" for name in ("cpu-fp32", "cpu-int8", "cpu-int4")}
    for each in done.json["targets"]:
        suite = suites[f"pydoc-llama/{each['target']}"]
        assert suite.get("failures") == "0"
        assert {case.get("name") for case in suite} == {gate["metric"] for gate in each["gates"]}


def test_a_failed_gate_is_a_failed_test_case(ready: Site, tmp_path: Path) -> None:
    junit, summary = tmp_path / "new" / "gates.xml", tmp_path / "summary"
    impossible = ("--set", "targets.cpu-int4.gates.kld_mean=0", "--junit", junit)
    with untouched(ready):
        done = ready.build(*impossible, env={"GITHUB_STEP_SUMMARY": str(summary)})
        refused(done, 4, "kld_mean")
    suite = next(each for each in ElementTree.parse(junit).getroot() if each.get("name") == "small/cpu-int4")
    assert suite.get("failures") == "1"
    failure = next(case for case in suite if case.get("name") == "kld_mean").find("failure")
    assert failure is not None
    assert "kld_mean" in str(failure.get("message"))
    assert "failed" in summary.read_text()


def test_github_is_told(ready: Site, tmp_path: Path) -> None:
    summary, output = tmp_path / "summary", tmp_path / "output"
    summary.write_text("# Before\n")
    env = {"GITHUB_STEP_SUMMARY": str(summary), "GITHUB_OUTPUT": str(output)}
    assert ready.build(env=env).code == 0
    lines = summary.read_text().splitlines()
    assert lines[0] == "# Before"
    assert lines[1].startswith("| target | precision |")
    assert [line.split("|")[1].strip() for line in lines[3:]] == ["cpu-fp32", "cpu-int8", "cpu-int4"]
    said = dict(line.split("=", 1) for line in output.read_text().splitlines())
    for name, identity in ready.ids().items():
        assert said[f"artifact_id_{name}"] == identity
        assert said[f"artifact_{name}"] == str(ready.out / "small" / name)


def test_events_to_standard_error_and_a_quiet_build(ready: Site) -> None:
    done = ready.build("--events", "-")
    events = [json.loads(line)["event"] for line in done.err.splitlines()]
    assert set(events) == {"hit", "result"}
    assert ready.build("--quiet").err == ""


@pytest.mark.parametrize("option", ["--events", "--junit"])
@pytest.mark.parametrize("place", ["", "file/x", "locked/x"])
def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(
    copies: Site, tmp_path: Path, option: str, place: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o555)
    site = Site.write(tmp_path / "site", (copies.root / "recipe.yaml").read_text())
    refused(site.build(option, tmp_path / place, prefix=obeying_modes()), 64, option, str(tmp_path))
    assert not site.out.exists()
    assert not (site.cache / "results").exists()


def test_github_files_that_cannot_be_written_are_a_note(copies: Site, tmp_path: Path) -> None:
    env = {"GITHUB_STEP_SUMMARY": str(tmp_path / "no" / "x"), "GITHUB_OUTPUT": str(tmp_path)}
    done = copies.build(env=env)
    refused(done, 0, "note: GITHUB_STEP_SUMMARY", "note: GITHUB_OUTPUT")
    assert "unchanged" in done.out


def test_a_reader_that_has_gone_is_no_error_of_ours(copies: Site) -> None:
    import subprocess

    from tests.e2e.harness import BIN, environment

    script = f"{BIN / 'enginewright'} build recipe.yaml --cache {copies.cache} --out {copies.out} | true"
    done = subprocess.run(script, shell=True, cwd=copies.root, env=environment(), capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
