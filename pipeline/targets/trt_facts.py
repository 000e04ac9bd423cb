"""What a TensorRT artifact's manifest says of its runtime, and whether a machine can run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.hardware import Hardware, Verdict
from pipeline.stages.tensorrt.flavours import flavour
from pipeline.targets import Facts


def facts(engine: Mapping[str, Any]) -> Facts:
    """The plan runs on the exact version that built it, and on the compute capabilities that it was compiled for."""
    settings = engine["settings"]
    asked = flavour(settings["flavour"])
    portable = bool(settings.get("version_compatible"))
    exact = {} if portable else dict.fromkeys(asked.distributions, settings["version"])
    return Facts(
        requires={asked.distribution: settings["version"]} if portable else {},
        exact=exact,
        layout="triton-model",
        entry=engine["components"]["model"],
        command=("enginewright", "verify", "--run", "."),
        device="cuda",
        compute_capability=tuple(settings["compute_capabilities"]),
        min_driver=settings["driver"],
        isa=(),
    )


def can_run(manifest: Mapping[str, Any], hardware: Hardware) -> Verdict:
    """A CUDA device of a compute capability that the plan was compiled for, and a driver that is new enough."""
    device = manifest["target"]["device"]
    wanted = [str(each) for each in device.get("compute_capability") or ()]
    here = [each for each in hardware.devices if each.kind == "cuda"]
    if not here:
        return Verdict(False, f"it needs a CUDA device of compute capability {_or(wanted)}, and this machine has none")
    fitting = [each for each in here if each.compute_capability in wanted or not each.compute_capability]
    if not fitting:
        have = ", ".join(f"{each.name} ({each.compute_capability})" for each in here)
        return Verdict(False, f"it is compiled for compute capability {_or(wanted)}, and this machine has {have}")
    oldest = str(device.get("min_driver") or "")
    driver = fitting[0].driver
    if oldest and driver and _number(driver) < _number(oldest):
        return Verdict(False, f"it needs an NVIDIA driver {oldest} or newer, and this machine has {driver}")
    return Verdict(True, f"{fitting[0].name} has a compute capability that it was compiled for")


def _or(names: list[str]) -> str:
    return " or ".join(names) or "?"


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
