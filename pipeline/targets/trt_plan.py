"""Open a plan on this machine: driver, digest, compute capability and version are asked before any byte is loaded.

A plan is code: what its digest does not vouch for is never handed to the library, and host code in a plan stays off.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.digest import sha256_file
from pipeline.errors import StageError, UnavailableError, VerificationError
from pipeline.stages.checkpoint import read_json
from pipeline.stages.tensorrt import api as trt_api
from pipeline.stages.tensorrt.flavours import flavour

_DIAGNOSTICS = {
    1: "it was built by another version",
    2: "it was not compiled for this GPU's compute capability",
    4: "the driver is too old",
    8: "the CUDA runtime is too old",
    16: "the GPU's memory does not hold it",
    32: "the file is no plan",
    64: "CUDA reports an error",
}
"""Bits that `get_engine_validity` sets."""


def read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(engine.json, its settings). StageError where it is not of an engine for TensorRT."""
    engine = read_json(folder / "engine.json")
    settings = engine.get("settings")
    if not isinstance(settings, dict) or "plans" not in settings or "digests" not in settings:
        raise StageError(f"{folder / 'engine.json'} is not of an engine for TensorRT", hint="build it again")
    return engine, settings


def check_files(folder: Path, settings: Mapping[str, Any]) -> None:
    """Every plan must have the digest that engine.json says. Raises VerificationError; nothing was loaded."""
    for name, digest in settings["digests"].items():
        path = folder / name
        if not path.is_file():
            raise VerificationError(f"{path} is missing", hint="fetch or build the artifact again")
        if (found := sha256_file(path)) != digest:
            raise VerificationError(
                f"{path} is not the plan that was built: its digest is {found}, and engine.json says {digest}",
                hint="a plan is code: it was not loaded. Fetch or build the artifact again",
            )


def device_capability() -> str:
    """Compute capability of the first CUDA device, `8.9`. UnavailableError without a driver or a device.

    Asks the driver itself, since the library ends in an error of its own where there is none.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise UnavailableError(
            "this machine has no NVIDIA driver (libcuda.so.1), and a TensorRT engine runs on a GPU",
            hint="run it on a machine with a GPU that the artifact is for; in a container, start it with the GPU",
        ) from None
    count, device, major, minor = (ctypes.c_int() for _ in range(4))
    if (status := cuda.cuInit(0)) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise UnavailableError(
            f"the NVIDIA driver finds no GPU here (cuInit says {status})",
            hint="check `nvidia-smi`; in a container, start it with the GPU",
        )
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    return f"{major.value}.{minor.value}"


def open_plan(folder: Path, capability: str | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """(module, engine, engine.json) of the plan for this machine's GPU.

    `capability` is that of the GPU; asked of the driver when None. Raises VerificationError for a changed plan,
    UnavailableError for a machine or version that does not run it, StageError when the library refuses it.
    """
    about, settings = read_settings(folder)
    check_files(folder, settings)
    asked = flavour(settings["flavour"])
    here = capability or device_capability()
    plans: Mapping[str, str] = settings["plans"]
    if here not in plans:
        raise UnavailableError(
            f"the artifact is compiled for compute capability {', '.join(plans)}, and this GPU has {here}",
            hint="build it with this machine among `devices`",
        )
    trt = trt_api.load(asked.name)
    found = trt_api.version(trt)
    if found != settings["version"] and not settings.get("version_compatible"):
        raise UnavailableError(
            f"the plan was built by {asked.title} {settings['version']}, and {found} is installed",
            hint="pip install " + " ".join(f"{name}=={settings['version']}" for name in asked.distributions),
        )
    runtime = trt.Runtime(trt_api.logger(trt))
    runtime.engine_host_code_allowed = False
    plan = (folder / plans[here]).read_bytes()
    if hasattr(runtime, "get_engine_validity"):
        _check_validity(trt, runtime, plan, asked.title)
    trt_api.complaints(trt)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise StageError(
            f"{asked.title} does not load {folder / plans[here]}: {trt_api.complaints(trt) or 'it gives no reason'}",
            hint="the file is what was built; check the driver and the free memory of the GPU",
        )
    return trt, engine, about


def _check_validity(trt: Any, runtime: Any, plan: bytes, title: str) -> None:
    """TensorRT-RTX says beforehand whether it would load a plan. It is no check of the plan's integrity."""
    validity, bits = runtime.get_engine_validity(plan[: max(64, runtime.engine_header_size)])
    if validity == trt.EngineValidity.INVALID:
        why = [text for bit, text in _DIAGNOSTICS.items() if int(bits) & bit]
        raise UnavailableError(
            f"{title} does not run this plan here: {'; '.join(why) or f'diagnostics {int(bits)}'}",
            hint="build it for this machine with the version that is installed here",
        )
