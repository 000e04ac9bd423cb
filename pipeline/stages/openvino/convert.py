"""Stage openvino.convert: an exported ONNX graph as an OpenVINO IR with named, dynamic inputs; decoders stateful.

The export is shared with every other target of the recipe. What is read is a file, so no framework comes along.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import StageError
from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.size import holding
from pipeline.stages.openvino.settings import Settings
from pipeline.step import Inputs, Progress, Stage


@frozen(kw_only=True)
class ConvertOptions:
    """The precision of the weights, and how they will run."""

    precision: Literal["fp32", "fp16", "bf16"] = option("fp32", "Type of the weights; bf16 stores fp32 and runs bf16.")
    settings: Settings = field(default_factory=Settings)


def run(inputs: Inputs, options: ConvertOptions, out: Path, progress: Progress) -> None:
    """inputs: model, export, optional tokenizer. Writes an engine's folder."""
    from pipeline.stages.checkpoint import read_json
    from pipeline.stages.openvino.file import save
    from pipeline.stages.openvino.layout import complete, describe
    from pipeline.stages.openvino.stateful import make_stateful

    export = read_json(inputs["export"] / "export.json")
    progress(0, 2, "read")
    model = _read(inputs["export"] / export["components"]["model"])
    decoder = export["kind"] == "decoder"
    if decoder:
        make_stateful(model)
        export["decoder"]["cache"] = "stateful"
    describe(model, options.settings, options.precision, decoder=decoder)
    progress(1, 2, "write")
    save(model, out, half=options.precision == "fp16")
    complete(
        out,
        inputs["model"],
        inputs.get("tokenizer"),
        export,
        options.settings,
        precision=options.precision,
        quantization=None,
    )
    progress(2, 2, "write")


def _read(file: Path) -> Any:
    import openvino as ov

    try:
        return ov.Core().read_model(file)
    except RuntimeError as error:
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
        raise StageError(
            f"OpenVINO {ov.__version__.partition('-')[0]} cannot read the exported graph: {reason.strip()}",
            hint="see the step's log; another version of OpenVINO may know the operator",
        ) from error


STAGE = Stage("openvino.convert", run, version=1, tools=("openvino",), memory=holding(200, weights=1.5))
