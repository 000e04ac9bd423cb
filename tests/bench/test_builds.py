"""Builds: costs by step and phase, imports found, commands shown without places."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import builds
import inputs
import jobs
import machine
import measure
import pytest

from tests.conftest import ROOT


def done(step: str, cpu_s: float, peak: int) -> str:
    return json.dumps({"event": "done", "step": step, "cpu_s": cpu_s, "wall_s": cpu_s, "peak_rss_bytes": peak})


def test_steps_are_those_that_ran() -> None:
    text = "\n".join(
        [
            json.dumps({"event": "start", "step": "export"}),
            done("export", 2, 100),
            json.dumps({"event": "hit", "step": "model"}),
            done("cpu-int8/engine", 1, 200),
            json.dumps({"event": "result", "targets": []}),
        ]
    )
    assert builds.steps(text) == {
        "export": {"cpu_s": 2, "wall_s": 2, "peak_bytes": 100},
        "cpu-int8/engine": {"cpu_s": 1, "wall_s": 1, "peak_bytes": 200},
    }


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


def test_medians_by_phase() -> None:
    def repetition(cpu_s: float) -> dict[str, object]:
        cold = {"cost": measure.Cost(cpu_s, 1, 500, 0), "disk_bytes": 9, "output_bytes": 8, "steps": {"export": {}}}
        return {"draft": {"cost": measure.Cost(cpu_s / 2, 1, 70, 0)}, "cold": cold}

    figures = builds.gather([repetition(10), repetition(12), repetition(11)])
    assert (figures["cold"]["cpu_s"], figures["draft"]["cpu_s"], figures["draft"]["peak_bytes"]) == (11, 5.5, 70)
    assert (figures["cold"]["disk_bytes"], figures["cold"]["output_bytes"]) == (9, 8)
    assert figures["cold"]["steps"] == {"export": {}} and "steps" not in figures["draft"]


def test_a_phase_is_measured_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its disk: cache and result, hard links once, the model's own files not at all; nothing of the other phases."""
    monkeypatch.setattr(builds, "HOME", tmp_path)
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "weights").write_bytes(b"x" * 8192)
    model = tmp_path / "inputs" / "weights"
    draft = (
        f"mkdir out cache; ln {model} cache/weights; head -c 4096 /dev/zero > cache/engine; ln cache/engine out/engine"
    )
    cold = "mkdir out; head -c 12288 /dev/zero > out/engine"
    phases = (jobs.Phase("draft", (("sh", "-c", draft),), "draft"), jobs.Phase("cold", (("sh", "-c", cold),), "build"))
    job = jobs.Job("job", "a job", lambda parent: ())
    found = builds.attempt(job, jobs.Attempt(jobs.OURS, phases, ("out",)), 1)
    assert [found["draft"][name] for name in ("disk_bytes", "output_bytes")] == [4096, 4096]
    assert [found["cold"][name] for name in ("disk_bytes", "output_bytes")] == [12288, 12288]


def test_parameters_are_read_from_the_headers(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"a": np.zeros((3, 5), np.float32), "b": np.zeros(7, np.float16)}, tmp_path / "one.safetensors")
    save_file({"c": np.zeros((), np.float32)}, tmp_path / "two.safetensors")
    assert inputs.parameters(tmp_path) == 3 * 5 + 7 + 1
