"""`enginewright doctor`: what is installed, what this host can build and run and why not, and whether a recipe fits."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pipeline import __version__, hardware, installed, targets
from pipeline.cli import preflight
from pipeline.cli.console import megabytes, table
from pipeline.cli.prepare import Prepared, prepare
from pipeline.errors import EnginewrightError, UnavailableError
from pipeline.run import toolchain
from pipeline.store import Store, open_store

SHOWN = (
    *("torch", "transformers", "tokenizers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu"),
    *(
        "onnxruntime-genai",
        "openvino",
        "openvino-genai",
        "openvino-tokenizers",
        "nncf",
        "tensorrt",
        "lmdeploy",
        "vllm",
        "optimum",
        "gguf",
        "xllamacpp",
    ),
)
"""Distributions whose versions people ask for."""


@click.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--cache", "root", type=click.Path(path_type=Path), help="The store.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", help="json: one document.")
def doctor(recipe: Path | None, root: Path | None, form: str) -> None:
    """Say what is installed, what this host can build and run, and whether RECIPE fits on it.

    Exit code 5 when the recipe has a target that cannot be built here.
    """
    store = open_store(root)
    host = hardware.probe()
    found: dict[str, Any] = {
        "enginewright": __version__,
        "python": platform.python_version(),
        "host": {
            "os": host.os,
            "arch": host.arch,
            "isa": list(host.isa),
            "cores": host.cores,
            "memory_bytes": host.memory_bytes,
            "devices": [f"{device.name} (compute capability {device.compute_capability})" for device in host.devices],
        },
        "store": {"path": str(store.root), "free_bytes": preflight.free(store.root)},
        "packages": {name: version for name in SHOWN if (version := installed.version(name))},
        "runtimes": [runtime_state(name) for name in targets.names()],
        "toolchains": {name: _toolchain(name) for name in toolchain.names()},
    }
    problems: list[str] = []
    if recipe:
        found["recipe"], problems = _recipe(recipe, store, host)
    click.echo(json.dumps(found, indent=2) if form == "json" else _text(found))
    if problems:
        raise UnavailableError("\n".join(problems), hint="see the report above")


def runtime_state(name: str) -> dict[str, Any]:
    """Whether a backend's packages are installed, and if not, the command that installs them."""
    try:
        extra = targets.load(name).EXTRA
    except UnavailableError as error:
        return {"runtime": name, "ok": False, "reason": error.message}
    missing = [
        each for each in _needed(extra) if not any(map(installed.version, (each, f"{each}-gpu", f"{each}-cuda")))
    ]
    reason = f"missing {', '.join(missing)}: pip install 'enginewright[{extra}]'" if missing else "installed"
    return {"runtime": name, "ok": not missing, "reason": reason}


def _needed(extra: str) -> list[str]:
    """The distributions that an extra asks for, the extras within it included."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    found: list[str] = []
    for line in requires("enginewright") or ():
        requirement = Requirement(line)
        if requirement.marker and requirement.marker.evaluate({"extra": extra}) and "extra" in str(requirement.marker):
            if requirement.name == "enginewright":
                found += [each for inner in sorted(requirement.extras) for each in _needed(inner)]
            else:
                found.append(requirement.name)
    return sorted(set(found))


def _toolchain(name: str) -> str:
    try:
        return toolchain.interpreter(name, {})
    except UnavailableError:
        return f"not installed: enginewright toolchain install {name}"


def _recipe(path: Path, store: Store, host: hardware.Hardware) -> tuple[dict[str, Any], list[str]]:
    try:
        prepared = prepare(path, store)
    except EnginewrightError as error:
        return {"path": str(path), "ok": False, "reason": str(error)}, [error.message]
    problems = [error.message for error in preflight.problems(prepared, prepared.plan.steps, store, host.memory_bytes)]
    report = {
        "path": str(path),
        "ok": not problems,
        "reason": "; ".join(problems) or "fits on this host",
        "disk_need_bytes": preflight.disk(prepared, prepared.plan.steps),
        "memory_need_bytes": max(step.memory_bytes for step in prepared.plan.steps),
        "targets": list(prepared.recipe.targets),
        "steps": len(prepared.plan.steps),
        "notes": list(_notes(prepared)),
    }
    return report, problems


def _notes(prepared: Prepared) -> Iterator[str]:
    """What fits, and is not what one would choose for it."""
    for name, target in prepared.recipe.targets.items():
        if prepared.job.kind == "decoder" and target.runtime in ("tensorrt", "tensorrt-rtx"):
            yield (
                f"{name}: a decoder with a static cache answers one user well; a server for many is TurboMind's or "
                "vLLM's work"
            )


def _text(found: Mapping[str, Any]) -> str:
    host = found["host"]
    lines = [
        f"enginewright {found['enginewright']}, Python {found['python']}",
        f"host: {host['os']} {host['arch']}, {host['cores']} cores, {megabytes(host['memory_bytes'])} memory",
        f"  isa: {' '.join(host['isa'])}",
        f"  accelerators: {', '.join(host['devices']) or 'none'}",
        f"store: {found['store']['path']} ({megabytes(found['store']['free_bytes'])} free)",
        "",
        table(("RUNTIME", "STATE"), [(row["runtime"], row["reason"]) for row in found["runtimes"]]),
        "",
        table(("TOOLCHAIN", "STATE"), _rows(found["toolchains"])),
        "",
        table(("PACKAGE", "VERSION"), _rows(found["packages"])),
    ]
    if recipe := found.get("recipe"):
        lines += ["", f"{recipe['path']}: {recipe['reason']}"]
        if "steps" in recipe:
            lines.append(
                f"  {len(recipe['targets'])} targets, {recipe['steps']} steps, about "
                f"{megabytes(recipe['disk_need_bytes'])} of disk and {megabytes(recipe['memory_need_bytes'])} of memory"
            )
        lines += [f"  note: {note}" for note in recipe.get("notes", ())]
    return "\n".join(lines)


def _rows(values: Mapping[str, str]) -> Sequence[tuple[str, str]]:
    return list(values.items())
