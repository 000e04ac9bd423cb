"""Which target a machine gets, and why not another one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.artifact.manifest import Device, Interface, Manifest, Requirement, Runtime, StageRecord, Target
from pipeline.hardware import Device as Gpu
from pipeline.hardware import Hardware, load
from pipeline.registry import select

HOST = Hardware("host", "linux", "x86_64", ("sse4_2", "avx2", "avx512_vnni"), 8, 16 << 30)
H100 = Gpu("cuda", "H100", "9.0", 80 << 30, "550.54")


def manifest(name: str, **changes: object) -> Manifest:
    target = {key: value for key, value in changes.items() if key in ("os", "arch", "isa", "device")}
    rest = {key: value for key, value in changes.items() if key not in target}
    about: dict[str, object] = {
        "name": "m",
        "version": "1",
        "build_key": "sha256:" + "0" * 64,
        "recipe": {},
        "target": Target(name=name, **target),  # type: ignore[arg-type]
        "runtime": Runtime(engine="copy", layout="hf"),
        "interface": Interface(task="t", kind="decoder"),
        "precision": "fp32",
    }
    return Manifest(**{**about, **rest})  # type: ignore[arg-type]


def cuda(name: str, *capabilities: str, **more: object) -> Manifest:
    return manifest(name, device=Device(kind="cuda", compute_capability=capabilities, **more))  # type: ignore[arg-type]


ALL = [
    manifest("portable"),
    manifest("vnni", isa=("avx2", "avx512_vnni")),
    manifest("avx2", isa=("avx2",)),
    manifest("amx", isa=("amx_tile",)),
    cuda("any-gpu"),
    cuda("sm90", "9.0"),
    cuda("sm80", "8.0"),
]


@pytest.mark.parametrize(
    ("hardware", "order"),
    [
        (HOST, ["vnni", "avx2", "portable"]),
        (replace(HOST, isa=("avx2", "avx512_vnni")), ["vnni", "avx2", "portable"]),
        (replace(HOST, isa=()), ["portable"]),
        (replace(HOST, devices=(H100,)), ["sm90", "any-gpu", "vnni", "avx2", "portable"]),
        (
            replace(HOST, devices=(replace(H100, compute_capability="8.6"),)),
            ["sm80", "any-gpu", "vnni", "avx2", "portable"],
        ),
        (replace(HOST, devices=(replace(H100, compute_capability="7.5"),)), ["any-gpu", "vnni", "avx2", "portable"]),
        (load("a100"), ["sm80", "any-gpu", "avx2", "portable"]),
        (load("x86-64-v4-amx"), ["amx", "vnni", "avx2", "portable"]),
    ],
)
def test_the_order(hardware: Hardware, order: list[str]) -> None:
    fits = select.rank(ALL, hardware, runtimes=False)
    assert [fit.target for fit in fits if fit.ok] == order
    assert len(fits) == len(ALL)
    assert all(fit.reason for fit in fits)


def test_equal_ones_keep_the_order_of_the_index() -> None:
    names = ["b", "a", "c"]
    assert [fit.target for fit in select.rank([manifest(name) for name in names], HOST)] == names


REFUSED = [
    (manifest("x", os="windows"), "built for windows, and this is linux"),
    (manifest("x", arch="aarch64", isa=("neon",)), "built for aarch64, and this is x86_64"),
    (
        manifest("x", arch="aarch64", stages=(StageRecord(id="e", stage="s", version=1, key="k", scope="isa"),)),
        "built for aarch64",
    ),
    (manifest("x", isa=("amx_tile", "avx2")), "needs amx_tile, which this CPU has not"),
    (manifest("x", device=Device(min_memory_bytes=32 << 30)), "needs 34.4 GB of memory, and this machine has 17.2 GB"),
    (cuda("x", "9.0"), "needs a CUDA device, and this machine has none"),
    (manifest("x", runtime=Runtime(engine="nothing", layout="x")), "no runtime is called 'nothing'"),
    (
        manifest("x", runtime=Runtime(engine="copy", layout="x", requires={"no-such-package": Requirement(min="2")})),
        "needs no-such-package >=2, which is not installed here",
    ),
    (
        manifest("x", runtime=Runtime(engine="copy", layout="x", requires={"click": Requirement(min="900")})),
        "needs click >=900, and ",
    ),
    (
        manifest("x", runtime=Runtime(engine="copy", layout="x", requires={"click": Requirement(exact="0.1")})),
        "needs click ==0.1, and ",
    ),
    (
        manifest("x", runtime=Runtime(engine="copy", layout="x", requires={"click": Requirement(max="0.1")})),
        "needs click <=0.1, and ",
    ),
]


@pytest.mark.parametrize(("asked", "reason"), REFUSED, ids=[reason[:30] for _, reason in REFUSED])
def test_why_not(asked: Manifest, reason: str) -> None:
    fit = select.fit(asked, HOST)
    assert not fit.ok
    assert reason in fit.reason


def test_gpu_memory_and_driver() -> None:
    machine = replace(HOST, devices=(H100,))
    assert "needs 171.8 GB of GPU memory" in select.fit(cuda("x", "9.0", min_memory_bytes=160 << 30), machine).reason
    small, large = replace(H100, memory_bytes=1 << 30), replace(H100, name="second")
    assert select.fit(cuda("x", "9.0", min_memory_bytes=2 << 30), replace(HOST, devices=(small, large))).rank == "exact"
    newer = cuda("x", "9.0", min_driver="560.1")
    assert select.fit(newer, machine).reason == "needs the driver 560.1 or newer, and this machine has 550.54"
    for driver in ("560.1", "570", ""):
        assert select.fit(newer, replace(HOST, devices=(replace(H100, driver=driver),))).rank == "exact"
    unknown = replace(HOST, devices=(replace(H100, compute_capability=""),))
    assert "is unknown" in select.fit(cuda("x", "9.0"), unknown).reason


def test_what_is_portable_runs_on_another_architecture() -> None:
    assert select.fit(manifest("x", arch="aarch64"), HOST).rank == "portable"


def test_reasons_cannot_steer_a_terminal() -> None:
    assert "\x1b" not in select.fit(manifest("x", isa=("\x1b[2J",)), HOST).reason
