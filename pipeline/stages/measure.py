"""Stage `parity`: run an engine on the reference's inputs and write how far it is from the reference.

Nothing of it depends on time: the same engine gives the same report. Whether the numbers are good enough is decided
afterwards, by `pipeline.parity.gates`, so that a changed gate does not run the engine again.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine import Engine
from pipeline.errors import StageError, UnavailableError
from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.size import holding
from pipeline.step import Inputs, Progress, Stage

if TYPE_CHECKING:  # planning imports this module, and these import numpy
    from pipeline.parity.judge import Judgement
    from pipeline.parity.stored import Stored


@frozen(kw_only=True)
class MeasureOptions:
    """How the engine is opened."""

    opener: str
    """`module:function`: (folder) or (folder, settings) -> Engine."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the opener gets beside the folder, when there is something."""
    share: float = option(1.0, "Of the fp32 weights that the engine holds when it is open: for planning.", key=False)
    batch: int = option(4, "How many samples of unequal length run together in the check of padding.", ge=2)


def run(inputs: Inputs, options: MeasureOptions, out: Path, progress: Progress) -> None:
    """Write `report.json` and, for language models, `kld.npy` [tokens] float32: the divergence of every position.

    `report.json`: kind, task, samples, metrics, worst, outputs (encoders), per_sample. A metric that is not a finite
    number is null there. Raises StageError when the engine fails, UnavailableError when its runtime is not installed.
    """
    import numpy as np

    from pipeline.parity.judge import judge
    from pipeline.parity.stored import Stored, write_json

    stored = Stored.open(inputs["reference"])
    engine = open_engine(options.opener, inputs["engine"], options.settings)
    found = judge(stored, engine, options.batch, accepted(inputs["engine"]), progress)
    write_json(out / "report.json", report(stored, found, inputs["engine"]))
    if len(found.kld):
        np.save(out / "kld.npy", found.kld.astype(np.float32))


def report(stored: Stored, found: Judgement, engine_dir: Path) -> dict[str, Any]:
    """The report as a JSON document. `worst` gets its text where the engine's folder has a tokenizer."""
    from pipeline.parity.judge import finite

    worst = {
        kind: {**entry, **finite({"value": entry["value"]})} for kind, entry in _with_text(found.worst, engine_dir)
    }
    document = {
        "kind": stored.kind,
        "task": stored.task,
        "samples": stored.samples,
        "metrics": finite(found.metrics),
        "worst": worst,
        "per_sample": found.samples,
    }
    if found.outputs:
        document["outputs"] = {name: finite(values) for name, values in found.outputs.items()}
    return document


def open_engine(opener: str, folder: Path, settings: Mapping[str, Any]) -> Engine:
    """Call `module:function` on a folder, and the settings if any.

    Raises UnavailableError when the module, or a package that it needs, is missing.
    """
    module, _, name = opener.partition(":")
    try:
        function: Callable[..., Engine] = getattr(importlib.import_module(module), name)
        return function(folder, dict(settings)) if settings else function(folder)
    except (ImportError, AttributeError) as error:
        raise UnavailableError(
            f"the engine cannot be opened by {opener}: {error}", hint="install the target's extra; see `doctor`"
        ) from error


def accepted(folder: Path) -> tuple[str, ...] | None:
    """The inputs that an engine's interface names; None when its folder does not say."""
    file = folder / "engine.json"
    if not file.is_file():
        return None
    try:
        names = tuple(str(entry["name"]) for entry in json.loads(file.read_text("utf-8"))["interface"]["inputs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(f"engine.json: no readable interface: {error!r}", hint="build the engine again") from error
    return names or None


def _with_text(worst: Mapping[str, dict[str, Any]], folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Add `text` beside `token_ids`: a reader knows words, not ids."""
    file = folder / "tokenizer.json"
    entries = list(worst.items())
    if not file.is_file() or not any("token_ids" in entry for _, entry in entries):
        return entries
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    return [
        (kind, {**entry, "text": tokenizer.decode(entry["token_ids"], skip_special_tokens=False)})
        if "token_ids" in entry
        else (kind, entry)
        for kind, entry in entries
    ]


STAGE = Stage("parity", run, version=1, tools=("numpy",), scope="device", memory=holding(300, weights=1.5, logits=3))
"""A target replaces `tools` by its runtime's distributions (`dataclasses.replace`): a new runtime is a new proof."""
