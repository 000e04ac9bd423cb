"""Target `copy`: packages the checkpoint as it is. For tests of the spine, and the shortest example of a target."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.engine import Array, Engine, Sampling, Token
from pipeline.errors import UnavailableError
from pipeline.frozen import frozen
from pipeline.hardware import Hardware, Verdict
from pipeline.recipe import TargetOptions, option
from pipeline.step import Inputs, Progress, Stage, Step
from pipeline.targets import Facts, Job
from pipeline.targets.common import fetch_model

EXTRA = ""


@frozen(kw_only=True)
class Options(TargetOptions):
    """Nothing to choose, but a note that enters the key."""

    note: str = option("", "A text that goes into engine.json.")


@frozen(kw_only=True)
class CopyOptions:
    """What the stage is told."""

    note: str
    task: str


def run(inputs: Inputs, options: CopyOptions, out: Path, progress: Progress) -> None:
    """Copy the model folder and describe it."""
    files = sorted(path for path in inputs["model"].rglob("*") if path.is_file())
    for done, file in enumerate(files):
        place = out / file.relative_to(inputs["model"])
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
        progress(done + 1, len(files), file.name)
    about = {"runtime": "copy", "task": options.task, "note": options.note, "precision": "source", "interface": {}}
    (out / "engine.json").write_text(json.dumps(about, indent=1, sort_keys=True), "utf-8")


STAGE = Stage("copy", run)


def why_not(kind: str, config: Mapping[str, Any], hardware: Hardware) -> str | None:
    """Never proposed, and no word about it: it serves nothing."""
    return ""


def steps(job: Job, name: str, options: Options, hardware: Hardware) -> tuple[Step, ...]:
    """Fetch, copy."""
    return (
        fetch_model(job),
        Step("engine", STAGE, CopyOptions(note=options.note, task=job.task), {"model": "model"}),
    )


def facts(engine: Mapping[str, Any], options: Options, hardware: Hardware) -> Facts:
    """A folder that needs nothing."""
    return Facts(requires={}, layout="hf", entry=".", command=(), device="cpu", isa=())


class _Nothing:
    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        raise UnavailableError("a copy is not an engine: it cannot run")

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Token]:
        raise UnavailableError("a copy is not an engine: it cannot generate")


def open(engine: Path, hardware: Hardware) -> Engine:
    """An engine that refuses every call."""
    return _Nothing()


def can_run(manifest: Mapping[str, Any], hardware: Hardware) -> Verdict:
    """Anywhere."""
    return Verdict(True, "a folder of files")
