"""Hardware: the host as it is, profiles by name, and what enters a key."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import hardware
from pipeline.errors import RecipeError
from pipeline.tables import table

MIB = 1 << 20


def test_the_host_is_what_the_kernel_says() -> None:
    host = hardware.probe()
    assert host.name == "host"
    assert host.cores >= 1
    if sys.platform == "linux":
        flags = Path("/proc/cpuinfo").read_text()
        assert all(f in flags for f in host.isa if host.arch == "x86_64")
        assert ("avx2" in host.isa) == (" avx2 " in flags)
        total = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()) * 1024
        assert 0 < host.memory_bytes <= total


def test_probing_costs_little_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; from pipeline import hardware; t = time.process_time(); hardware.probe();"
        "assert time.process_time() - t < 0.1; assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert hardware.probe() is hardware.probe()  # asked once a process


@pytest.mark.parametrize("name", hardware.names())
def test_every_name_loads(name: str) -> None:
    machine = hardware.load(name)
    assert machine.name == name
    assert machine.isa == tuple(f for f in hardware.ISA if f in machine.isa)
    for device in machine.devices:
        assert float(device.compute_capability or 7.5) >= 7.5 or name == "host"
        assert device.memory_bytes > 8 << 30 or name == "host"


def test_a_profile_has_its_words_in_the_list_of_features() -> None:
    for profile in table("hardware")["cpu"].values():
        assert set(profile["isa"]) <= set(hardware.ISA)


def test_a_wrong_name_is_met_with_the_right_one() -> None:
    with pytest.raises(RecipeError) as error:
        hardware.load("rtx4090")
    assert error.value.exit_code == 64
    assert "did you mean 'rtx-4090'?" in str(error.value)
    with pytest.raises(RecipeError, match="one of: host, x86-64-v3"):
        hardware.load("zzz")


def test_facts_hold_only_what_the_scope_names() -> None:
    h200 = hardware.load("h200")
    assert hardware.facts(h200, "portable") == {}
    assert set(hardware.facts(h200, "isa")) == {"os", "arch", "isa"}
    assert hardware.facts(h200, "device")["device"] == {"kind": "cuda", "compute_capability": "9.0"}
    assert hardware.facts(hardware.load("arm64"), "device")["device"] is None
    other = dataclasses.replace(h200, name="other", cores=96, memory_bytes=1 << 40)
    assert hardware.facts(other, "device") == hardware.facts(h200, "device")
    assert hardware.facts(hardware.load("h100"), "device") == hardware.facts(h200, "device")


def test_cpuinfo_of_an_arm_machine(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nFeatures\t: fp asimd evtstrm aes asimdhp asimddp sve i8mm bf16\n")
    assert hardware._isa_linux(file) == ("neon", "fp16", "dotprod", "i8mm", "bf16", "sve")
    assert hardware._isa_linux(tmp_path / "absent") == ()


def test_a_cgroup_limits_memory_and_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "self"
    mine.write_text("0::/pod/app\n")
    group = tmp_path / "cg" / "pod"
    (group / "app").mkdir(parents=True)
    original = hardware._groups
    monkeypatch.setattr(hardware, "_groups", lambda root, controller: original(root, controller, mine))
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (group / "app" / "memory.max").write_text("max\n")
    (group / "app" / "cpu.max").write_text("max 100000\n")
    assert hardware._cores(tmp_path / "cg") == 8
    (group / "memory.max").write_text(f"{512 * MIB}\n")
    (group / "cpu.max").write_text("150000 100000\n")
    assert hardware._memory(tmp_path / "cg") == 512 * MIB
    assert hardware._cores(tmp_path / "cg") == 2


def test_a_cgroup_of_the_first_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "self"
    mine.write_text("4:cpu,cpuacct:/docker/x\n9:memory:/docker/x\n")
    original = hardware._groups
    monkeypatch.setattr(hardware, "_groups", lambda root, controller: original(root, controller, mine))
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{64 * MIB}\n")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("100000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert hardware._memory(tmp_path) == 64 * MIB
    assert hardware._cores(tmp_path) == 1


def test_gpus_come_from_the_drivers_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 9.0, 143771, 580.65.06'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert hardware._nvidia() == (hardware.Device("cuda", "NVIDIA H200", "9.0", 143771 * MIB, "580.65.06"),)


def test_gpus_without_the_tool_have_a_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    proc = tmp_path / "gpus" / "0000:01:00.0"
    proc.mkdir(parents=True)
    (proc / "information").write_text("Model: \t\t NVIDIA L4\nIRQ: 1\n")
    assert hardware._nvidia(tmp_path / "gpus") == (hardware.Device("cuda", "NVIDIA L4", "", 0),)
    assert hardware._nvidia(tmp_path / "none") == ()
