"""Stage openvino.compile: the compiled engine for one device beside the portable IR, so that a start compiles nothing.

The blob holds the model as the device's plugin transformed it; the weights stay in the .bin that lies beside it. It
loads in the same version of OpenVINO on the same kind of device alone: engine.json says in which, `open_engine` checks
it and takes the IR elsewhere.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import hardware
from pipeline.errors import StageError
from pipeline.stages.openvino_settings import Settings, properties
from pipeline.step import Inputs, Progress, Stage

BLOB = "openvino_model.blob"


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """How the engine will run: what decides what is compiled."""

    settings: Settings = field(default_factory=Settings)


def run(inputs: Inputs, options: CompileOptions, out: Path, progress: Progress) -> None:
    """inputs: ir (an engine's folder). Writes the same folder with a blob, and says in engine.json where it loads."""
    import openvino as ov

    from pipeline.stages.checkpoint import read_json
    from pipeline.stages.openvino_file import XML
    from pipeline.stages.openvino_graphs import last_logits_only
    from pipeline.stages.openvino_layout import write_json

    engine = read_json(inputs["ir"] / "engine.json")
    decoder = engine["kind"] == "decoder"
    for file in sorted(inputs["ir"].iterdir()):
        if file.name != "engine.json":
            _link(file, out / file.name)
    asked = properties(options.settings, decoder=decoder)
    progress(0, 1, options.settings.device)
    core = ov.Core()
    model = core.read_model(out / XML)
    last = decoder and last_logits_only(model)
    try:
        compiled = core.compile_model(model, options.settings.device, {**asked, "CACHE_MODE": "OPTIMIZE_SIZE"})
        blob = compiled.export_model()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise StageError(f"OpenVINO cannot compile it for {options.settings.device}: {reason}") from error
    (out / BLOB).write_bytes(blob if isinstance(blob, bytes) else blob.getvalue())
    engine["compiled"] = {
        "file": BLOB,
        "answers": "last" if last else "all",
        "openvino": ov.__version__,
        "device": options.settings.device,
        "properties": asked,
        **here(),
    }
    write_json(out / "engine.json", engine)
    progress(1, 1, options.settings.device)


def here() -> dict[str, Any]:
    """This CPU, as far as compiled code depends on it."""
    host = hardware.probe()
    return {"os": host.os, "arch": host.arch, "isa": list(host.isa)}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


STAGE = Stage("openvino.compile", run, version=1, tools=("openvino",), scope="device")
