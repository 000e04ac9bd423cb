"""Put an LLM server's folder together: quantized weights, tokenizer, serve settings, engine.json; then validate it.

The weights are links to what llm.quantize wrote: targets whose scheme is the same share the bytes.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.stages.llm.scheme import Scheme
from pipeline.stages.share import share
from pipeline.step import Inputs, Progress
from pipeline.tables import DATA

PROBE = DATA / "llm_probe.py"
_EXTRAS = ("generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
           "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
           "chat_template.json")  # fmt: skip


@frozen(kw_only=True)
class FolderOptions:
    """What engine.json says beside what the quantized folder says of itself."""

    runtime: str
    scheme: Scheme
    context_length: int = option(unit="tokens", ge=1)
    eos_token_ids: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How the engine is opened."""
    serve: tuple[str, ...] = ()
    """The command that serves the folder, `{artifact}` in its place."""
    checked: str = ""
    """Which versions of the engine the facts were checked with."""


def run(inputs: Inputs, options: FolderOptions, out: Path, progress: Progress) -> None:
    """inputs: model, quantized. Raises VerificationError when the folder is not what every engine takes it for."""
    from pipeline.stages.llm.check import require

    weights = inputs["quantized"] / "weights"
    for path in sorted(weights.iterdir()):
        share(path, out / path.name)
    for name in _EXTRAS:
        if (inputs["model"] / name).is_file():
            share(inputs["model"] / name, out / name)
    if options.serve:
        shutil.copyfile(PROBE, out / "probe.py")
    for path in out.iterdir():
        with contextlib.suppress(PermissionError):
            path.chmod(0o444)
    progress(0, 1, "validating")
    require(out, inputs["model"], inputs["quantized"] / "folds", options.scheme.method)
    config = json.loads((out / "config.json").read_text("utf-8"))
    engine = {
        "runtime": options.runtime,
        "task": "text-generation",
        "kind": "decoder",
        "precision": options.scheme.precision,
        "quantization": _quantization(options.scheme),
        "settings": dict(options.settings),
        "serve": list(options.serve),
        "checked_with": options.checked,
        "validated": ["names", "types", "shapes", "config fields", "value ranges", "weights against the source"],
        "interface": {
            "inputs": [
                {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]},
                {"name": "attention_mask", "dtype": "int64", "shape": ["batch", "sequence"]},
            ],
            "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", "sequence", config["vocab_size"]]}],
        },
        "decoder": {
            "context_length": options.context_length,
            "eos_token_ids": list(options.eos_token_ids),
            "vocab_size": config["vocab_size"],
        },
    }
    (out / "engine.json").write_text(json.dumps(engine, indent=2) + "\n", encoding="utf-8")
    progress(1, 1, "validated")


def _quantization(scheme: Scheme) -> dict[str, Any] | None:
    if not scheme.bits:
        return None
    told: dict[str, Any] = {"method": scheme.method, "layout": scheme.layout, "bits": scheme.bits}
    told |= {"group_size": scheme.group_size, "symmetric": scheme.symmetric} if scheme.bits == 4 else {}
    return {**told, "scales": scheme.dtype}
