"""Builds: events split into building and proving, imports found, commands shown without places."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import builds
import inputs
import jobs
import machine
import pytest

from tests.conftest import ROOT


def done(step: str, cpu_s: float, peak: int) -> str:
    return json.dumps({"event": "done", "step": step, "cpu_s": cpu_s, "wall_s": cpu_s, "peak_rss_bytes": peak})


def test_events_split_into_building_and_proving() -> None:
    text = "\n".join(
        [
            json.dumps({"event": "start", "step": "export"}),
            done("model", 0.5, 40),
            done("parity-data", 0.25, 40),
            done("reference", 8, 900),
            done("export", 2, 100),
            done("cpu-int8/engine", 1, 200),
            done("cpu-int8/parity", 4, 800),
            done("cpu-int4/unquantized", 2, 300),
            done("cpu-int4/parity.unquantized", 4, 800),
            done("golden", 1, 40),
            json.dumps({"event": "hit", "step": "export"}),
            json.dumps({"event": "result", "targets": []}),
        ]
    )
    found = builds.split_events(text)
    assert found["proof_cpu_s"] == 19.25
    assert found["build_peak_bytes"] == 200
    assert found["exports"] == 1
    assert set(found["steps"]) >= {"model", "export", "cpu-int8/engine"}


@pytest.mark.parametrize(
    "step", ["reference", "cpu/reference", "parity-data", "cpu/parity", "cpu/parity.unquantized", "cpu/golden"]
)
def test_steps_that_prove(step: str) -> None:
    assert builds.is_proof(step)


@pytest.mark.parametrize("step", ["model", "calibration", "export", "cpu/export", "cpu/engine"])
def test_steps_that_build(step: str) -> None:
    assert not builds.is_proof(step)


def test_imports_are_found_where_python_reports_them() -> None:
    code = "import json, numpy"
    run = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    assert builds.heavy_imports(run.stderr) == ["numpy"]
    assert builds.heavy_imports("torch was not imported") == []


def test_commands_are_shown_without_places(tmp_path: Path) -> None:
    command = (f"{tmp_path}/bin/python3.11", "-m", "tool", "-m", f"{ROOT}/.bench/inputs/x", "--out", "out")
    assert machine.shown(command) == "python -m tool -m .bench/inputs/x --out out"
    assert machine.shown((f"{tmp_path}/bin/olive", "run")) == "olive run"


def test_every_tool_does_every_job_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "HOME", tmp_path)
    tools = jobs.Interpreters(Path(sys.executable), Path("/olive/bin/python"), Path("/optimum/bin/python"))
    for name, job in builds.all_jobs(tools).items():
        attempted = {one.tool for one in job.attempts(tmp_path)}
        assert attempted.isdisjoint(job.missing), name
        assert attempted | set(job.missing) == set(jobs.TOOLS), name


def test_medians_by_phase_with_the_build_steps_alone() -> None:
    import measure

    def repetition(cpu_s: float, proof: float) -> dict[str, object]:
        events = {"proof_cpu_s": proof, "build_peak_bytes": 70, "build_disk_bytes": 8, "steps": {}, "exports": 1}
        return {"cold": {"cost": measure.Cost(cpu_s, 1, 500, 0), "disk_bytes": 9, "output_bytes": 8, "events": events}}

    figures = builds.gather([repetition(10, 6), repetition(12, 7), repetition(11, 5)])["cold"]
    assert figures["cpu_s"] == 11
    assert figures["build_only"]["cpu_s"] == 5
    assert figures["build_only"]["peak_bytes"] == 70
    assert figures["build_only"]["disk_bytes"] == 8
    assert figures["disk_bytes"] == 9


def test_parameters_are_read_from_the_headers(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"a": np.zeros((3, 5), np.float32), "b": np.zeros(7, np.float16)}, tmp_path / "one.safetensors")
    save_file({"c": np.zeros((), np.float32)}, tmp_path / "two.safetensors")
    assert inputs.parameters(tmp_path) == 3 * 5 + 7 + 1


def test_what_building_takes_on_disk(tmp_path: Path) -> None:
    """The artifact and what the building steps left in the store: neither what proved it, nor the model's own files."""
    import measure

    for name, size in (
        ("inputs/weights", 8192),
        ("cache/results/engine-1/out", 4096),
        ("cache/results/parity-1/x", 4096),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "engine").hardlink_to(tmp_path / "cache/results/engine-1/out")
    (tmp_path / "out" / "weights").hardlink_to(tmp_path / "inputs/weights")
    steps = (("t/engine", "engine-1"), ("t/parity", "parity-1"))
    text = "\n".join(json.dumps({"event": "done", "step": step, "key": key}) for step, key in steps)
    made = builds.results_of_building(tmp_path, text)
    assert made == [tmp_path / "cache/results/engine-1"]
    assert measure.disk_bytes([tmp_path / "out", *made], [tmp_path / "inputs"]) == 4096
    assert measure.disk_bytes([tmp_path / "out", tmp_path / "cache"], [tmp_path / "inputs"]) == 8192
