"""Which target of a version a machine should have: exact before family before instruction set before portable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from packaging.version import InvalidVersion, Version

from pipeline import targets
from pipeline.artifact.manifest import Manifest, Requirement, Target, freeze
from pipeline.errors import UnavailableError
from pipeline.frozen import frozen
from pipeline.hardware import ISA, Device, Hardware
from pipeline.installed import version
from pipeline.registry.origin import plain

Rank = Literal["exact", "family", "isa", "portable", "no"]
ORDER: tuple[Rank, ...] = ("exact", "family", "isa", "portable", "no")


@frozen
class Fit:
    """How one target suits a machine."""

    target: str
    rank: Rank
    reason: str

    @property
    def ok(self) -> bool:
        """Whether the machine can run it."""
        return self.rank != "no"


def rank(manifests: Sequence[Manifest], hardware: Hardware, *, runtimes: bool = True) -> list[Fit]:
    """A verdict on each target, the best first; equal ones keep the order of the index.

    `runtimes` also asks whether what serves the target is installed here.
    """
    found = [(fit(manifest, hardware, runtimes=runtimes), manifest.target) for manifest in manifests]
    # sorted() keeps the order of the index among equals.
    return [each for each, _ in sorted(found, key=lambda pair: (ORDER.index(pair[0].rank), *_generic(pair[1])))]


def _generic(target: Target) -> tuple[bool, int, int]:
    """How little a target is made for one kind of machine: names no device, no recent instruction, few of them."""
    newest = max((ISA.index(feature) for feature in target.isa if feature in ISA), default=-1)
    return not target.device.compute_capability, -newest, -len(target.isa)


def fit(manifest: Manifest, hardware: Hardware, *, runtimes: bool = True) -> Fit:
    """The verdict on one target: what the manifest says of the machine, then its backend's own judgement."""
    ranked, reason = _machine(manifest, hardware)
    if ranked != "no" and (objection := _objection(manifest, hardware, runtimes=runtimes)):
        ranked, reason = "no", objection
    return Fit(manifest.target.name, ranked, plain(reason))


def _objection(manifest: Manifest, hardware: Hardware, *, runtimes: bool) -> str:
    """Why the backend, or what is installed here, cannot serve it; empty if it can."""
    try:
        backend = targets.load(manifest.runtime.engine)
    except UnavailableError as error:
        return error.message
    able = backend.can_run(freeze(manifest), hardware)
    if not able.ok:
        return able.reason
    return "; ".join(_lacking(manifest.runtime.requires)) if runtimes else ""


def _machine(manifest: Manifest, hardware: Hardware) -> tuple[Rank, str]:
    """How near the target's machine is to this one."""
    target = manifest.target
    if target.os != hardware.os:
        return "no", f"built for {target.os}, and this is {hardware.os}"
    bound = any(stage.scope != "portable" for stage in manifest.stages) or target.isa
    if target.arch != hardware.arch and bound:
        return "no", f"built for {target.arch}, and this is {hardware.arch}"
    if lacks := [feature for feature in target.isa if feature not in hardware.isa]:
        return "no", f"needs {', '.join(lacks)}, which this CPU has not"
    if target.device.kind == "cuda":
        return _cuda(manifest, hardware)
    need = target.device.min_memory_bytes or manifest.size_bytes
    if hardware.memory_bytes and need > hardware.memory_bytes:
        return "no", f"needs {_gb(need)} of memory, and this machine has {_gb(hardware.memory_bytes)}"
    if target.device.kind != "cpu":
        return "family", f"for {target.device.kind}"
    if target.isa and set(target.isa) == set(hardware.isa):
        return "exact", "built for exactly this CPU's instructions"
    if target.isa:
        return "isa", f"uses {', '.join(target.isa)}, which this CPU has"
    return "portable", f"runs on any {hardware.arch} CPU"


def _cuda(manifest: Manifest, hardware: Hardware) -> tuple[Rank, str]:
    device = manifest.target.device
    wanted, need, oldest = device.compute_capability, device.min_memory_bytes or 0, device.min_driver or ""
    here = [each for each in hardware.devices if each.kind == "cuda"]
    if not here:
        return "no", "needs a CUDA device, and this machine has none"
    large = [each for each in here if not each.memory_bytes or each.memory_bytes >= need]
    if not large:
        return "no", f"needs {_gb(need)} of GPU memory, and {here[0].name} has {_gb(here[0].memory_bytes)}"
    fresh = [each for each in large if not (oldest and each.driver) or _at_least(each.driver, oldest)]
    if not fresh:
        return "no", f"needs the driver {oldest} or newer, and this machine has {large[0].driver}"
    if not wanted:
        return "family", f"for any CUDA device, as {fresh[0].name}"
    if exact := [each for each in fresh if each.compute_capability in wanted]:
        return "exact", f"built for compute capability {exact[0].compute_capability}, which {exact[0].name} has"
    if near := [each for each in fresh if any(_same_family(each, text) for text in wanted)]:
        return "family", f"built for {', '.join(wanted)}, of the same family as {near[0].compute_capability}"
    if unknown := [each for each in fresh if not each.compute_capability]:
        return "family", f"built for {', '.join(wanted)}; the compute capability of {unknown[0].name} is unknown"
    have = ", ".join(each.compute_capability for each in fresh)
    return "no", f"built for compute capability {', '.join(wanted)}, and this machine has {have}"


def _same_family(device: Device, wanted: str) -> bool:
    """Same major compute capability, and not older: what NVIDIA promises for compiled code."""
    try:
        have, need = ([int(part) for part in text.split(".")] for text in (device.compute_capability, wanted))
    except ValueError:
        return False
    return have[:1] == need[:1] and have >= need


def _lacking(requires: Mapping[str, Requirement]) -> list[str]:
    """What is not installed here, or in another version."""
    found = []
    for name, wanted in sorted(requires.items()):
        have = version(name)
        asked = " ".join(
            f"{sign}{text}"
            for sign, text in (("==", wanted.exact), (">=", wanted.min), ("<=", wanted.max))
            if text is not None
        )
        if have is None:
            found.append(f"needs {name} {asked}".rstrip() + ", which is not installed here")
        elif not _satisfies(have, wanted):
            found.append(f"needs {name} {asked}, and {have} is installed here")
    return found


def _at_least(have: str, oldest: str) -> bool:
    return _satisfies(have, Requirement(min=oldest))


def _satisfies(have: str, wanted: Requirement) -> bool:
    try:
        version = Version(have)
        low, high = (Version(text) if text else None for text in (wanted.min, wanted.max))
        return not (
            (wanted.exact is not None and version != Version(wanted.exact))
            or (low is not None and version < low)
            or (high is not None and version > high)
        )
    except InvalidVersion:
        return False


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
