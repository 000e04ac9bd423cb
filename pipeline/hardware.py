"""Hardware: what a machine is, as a value: this host, or a named profile of data/hardware.toml."""

from __future__ import annotations

import difflib
import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError
from pipeline.frozen import frozen
from pipeline.step import Scope
from pipeline.tables import table

MIB = 1 << 20
NVIDIA_SMI_TIMEOUT_S = 10

# What inference kernels look for, in the order in which it is reported; the words of Linux's /proc/cpuinfo.
ISA = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("neon", "fp16", "dotprod", "i8mm", "bf16", "sve", "sve2"),
)
# What Linux and macOS call these on Arm. The kernel's word is an alias of the name that the field uses.
_ARM = {"asimd": "neon", "asimdhp": "fp16", "asimddp": "dotprod"}
_APPLE = {"FEAT_FP16": "fp16", "FEAT_DotProd": "dotprod", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16"}
_ARCH = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}


@frozen
class Device:
    """An accelerator."""

    kind: str
    """`cuda`."""
    name: str
    compute_capability: str
    """`9.0`; empty if unknown."""
    memory_bytes: int
    """0 if unknown."""
    driver: str = ""
    """Version of the driver; empty in a profile."""


@frozen
class Hardware:
    """What a machine is. Zero cores or bytes mean unknown (a host) or any (a profile)."""

    name: str
    os: str
    """`linux`, `darwin`, `windows`."""
    arch: str
    """`x86_64`, `aarch64`."""
    isa: tuple[str, ...] = ()
    """The CPU's features, of those in `ISA` and in its order."""
    cores: int = 0
    """How many this process may use, cgroup quota and affinity included."""
    memory_bytes: int = 0
    """Limit of the cgroup or the machine's memory, the lower."""
    devices: tuple[Device, ...] = ()


@frozen
class Verdict:
    """Yes or no, with the reason."""

    ok: bool
    reason: str


def facts(hardware: Hardware, scope: Scope) -> dict[str, Any]:
    """What of the hardware enters a key: nothing (`portable`), the CPU (`isa`), the CPU and first device (`device`)."""
    if scope == "portable":
        return {}
    found: dict[str, Any] = {"os": hardware.os, "arch": hardware.arch, "isa": list(hardware.isa)}
    if scope == "device":
        first = hardware.devices[0] if hardware.devices else None
        found["device"] = first and {"kind": first.kind, "compute_capability": first.compute_capability}
    return found


def no_cuda(hardware: Hardware) -> str | None:
    """Why an engine for CUDA cannot run on a machine; None when it has such a device."""
    found = any(device.kind == "cuda" for device in hardware.devices)
    return None if found else "needs a CUDA device, and this machine has none"


def load(name: str) -> Hardware:
    """`host` or a profile by name. Raises RecipeError for a name that is neither."""
    if name == "host":
        return probe()
    cpus, gpus = table("hardware")["cpu"], table("hardware")["gpu"]
    if name in cpus:
        return Hardware(name=name, os="linux", arch=cpus[name]["arch"], isa=_ordered(cpus[name]["isa"]))
    if name in gpus:
        gpu = gpus[name]
        device = Device("cuda", gpu["device"], gpu["compute_capability"], gpu["memory_mib"] * MIB)
        # The least that a server with such a GPU has; what is built for the GPU does not depend on it.
        return Hardware(name=name, os="linux", arch="x86_64", isa=_ordered(cpus["x86-64-v3"]["isa"]), devices=(device,))
    near = difflib.get_close_matches(name, names(), n=1)
    raise RecipeError(
        f"unknown hardware {name!r}",
        hint=f"did you mean {near[0]!r}?" if near else f"hardware is one of: {', '.join(names())}",
    )


def names() -> tuple[str, ...]:
    """Every name that `load` knows."""
    return ("host", *table("hardware")["cpu"], *table("hardware")["gpu"])


@functools.cache
def probe() -> Hardware:
    """This host. Standard library only; asked once a process."""
    system = platform.system().lower()
    machine = platform.machine().lower()
    return Hardware(
        name="host",
        os=system,
        arch=_ARCH.get(machine, machine),
        isa=_isa_darwin() if system == "darwin" else _isa_linux(Path("/proc/cpuinfo")),
        cores=_cores(),
        memory_bytes=_memory(),
        devices=_nvidia(),
    )


def _ordered(features: Iterable[str]) -> tuple[str, ...]:
    have = set(features)
    return tuple(feature for feature in ISA if feature in have)


def _isa_linux(cpuinfo: Path) -> tuple[str, ...]:
    """The first core's flags: `flags` on x86, `Features` on Arm."""
    for line in _read(cpuinfo).splitlines():
        key, _, words = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return _ordered(_ARM.get(word, word) for word in words.split())
    return ()


def _isa_darwin() -> tuple[str, ...]:
    if platform.machine() == "arm64":
        asked = [f"hw.optional.arm.{feature}" for feature in _APPLE]
        answers = _command("sysctl", "-i", "-n", *asked).split()
        have = [name for name, answer in zip(_APPLE.values(), answers, strict=False) if answer == "1"]
        return _ordered(["neon", *have])
    words = _command("sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features").lower().split()
    return _ordered({"sse4.2": "sse4_2", "avx1.0": "avx"}.get(word, word) for word in words)


def _cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    for group in _groups(root, "cpu"):
        quota, period = (_read(group / "cpu.max").split() or ["max", ""])[:2]
        if quota == "max":
            quota, period = _read(group / "cpu.cfs_quota_us").strip(), _read(group / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit():
            # A quota of 1.5 cores is worked best by two threads.
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def _memory(root: Path = Path("/sys/fs/cgroup")) -> int:
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = 0
    for group in _groups(root, "memory"):
        for limit in (_read(group / "memory.max").strip(), _read(group / "memory.limit_in_bytes").strip()):
            # cgroup v1 says "no limit" by a number beyond any machine's memory: the minimum covers it.
            if limit.isdigit():
                memory = min(memory or int(limit), int(limit))
    return memory


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that processes can still take: what the kernel calls available, within every cgroup's limit; 0: unknown."""
    lines = dict(line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) << 10 if "MemAvailable" in lines else _memory()
    for group in _groups(root / "sys/fs/cgroup", "memory", root / "proc/self/cgroup"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            most, now = _read(group / limit).strip(), _read(group / used).strip()
            if most.isdigit() and now.isdigit():
                stat = dict(line.split() for line in _read(group / "memory.stat").splitlines() if line.count(" ") == 1)
                cache = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))  # the kernel takes it back
                free = min(free, max(0, int(most) - int(now) + cache))
    return free


def _groups(root: Path, controller: str, mine: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """This process' cgroup and those above it, for v2 (`0::/path`) or v1 (`4:cpu,cpuacct:/path`): each may limit it.

    Inside a container the path may be the host's and absent here; the mount's root is then the container's own group.
    """
    found: list[Path] = []
    for line in _read(mine).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            base = root
        elif controller in controllers.split(","):
            base = root / controller
        else:
            continue
        here = base / path.lstrip("/")
        found += [here, *(above for above in here.parents if above.is_relative_to(base))]
    return found


def _nvidia(proc: Path = Path("/proc/driver/nvidia/gpus")) -> tuple[Device, ...]:
    if shutil.which("nvidia-smi"):
        fields = "name,compute_cap,memory.total,driver_version"
        rows = _command("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits").splitlines()
        parts = [[field.strip() for field in row.split(",")] for row in rows]
        found = tuple(
            Device("cuda", name, capability, int(mib) * MIB if mib.isdigit() else 0, driver)
            for name, capability, mib, driver in (row for row in parts if len(row) == 4)
        )
        if found:
            return found
    # A container may have the device without the driver's tools: the kernel module says at least the name.
    information = sorted(proc.glob("*/information")) if proc.is_dir() else []
    models = [line for file in information for line in _read(file).splitlines() if line.startswith("Model:")]
    return tuple(Device("cuda", line.partition(":")[2].strip(), "", 0) for line in models)


def _command(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
