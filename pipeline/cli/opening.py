"""Opening an artifact for the verbs that run it: checked first, by the runtime that built it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import RecipeError, StageError, UnavailableError

if TYPE_CHECKING:
    from pipeline.engine import Engine


def open_artifact(artifact: Path, verify: bool) -> Engine:
    """The artifact's engine, by the runtime that built it. An engine's folder without a manifest is taken as it is."""
    from pipeline import hardware, targets

    machine = hardware.probe()
    if (artifact / "manifest.json").exists():
        if verify:
            from pipeline.artifact.verify import examine, require

            require(examine(artifact))
        manifest = read_json(artifact / "manifest.json")
        target = targets.load(_runtime(manifest.get("runtime"), "engine", artifact / "manifest.json"))
        verdict = target.can_run(manifest, machine)
        if not verdict.ok:
            raise UnavailableError(
                f"this machine cannot run the artifact: {verdict.reason}",
                hint="see `enginewright inspect` for what it needs",
            )
        return target.open(artifact, machine)
    if not artifact.is_dir():
        raise RecipeError(
            f"{artifact} is not a folder", hint="give the folder of an artifact: `artifacts/<name>/<target>`"
        )
    file = artifact / "engine.json"
    if not file.is_file():
        from pipeline.artifact.read import not_above

        not_above(artifact)
        raise RecipeError(
            f"{artifact} has neither manifest.json nor engine.json", hint="give the folder of an artifact, or build one"
        )
    return targets.load(_runtime(read_json(file), "runtime", file)).open(artifact, machine)


def read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError(f"{file} cannot be read: {error}", hint="run `enginewright verify` on the artifact") from error
    return found if isinstance(found, dict) else {}


def _runtime(holder: Any, name: str, file: Path) -> str:
    value = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(value, str):
        raise StageError(f"{file} names no runtime", hint="build the artifact again")
    return value
