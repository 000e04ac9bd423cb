"""Stage openvino.compress: the weights of an IR in int8 or int4 by NNCF, with calibration data where the method asks.

Rounding to nearest of decoders does not come here: openvino.decoder writes the same bytes in a tenth of the memory.
"""

from __future__ import annotations

from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import StageError
from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.size import holding
from pipeline.stages.openvino.settings import Settings
from pipeline.stages.openvino.weights import Compression
from pipeline.step import Inputs, Progress, Stage


@frozen(kw_only=True)
class CompressOptions:
    """How the weights are stored, and how much of the calibration data is used."""

    precision: Literal["int8", "int4"] = option("int4", "Type of the weights.")
    compression: Compression = field(default_factory=Compression)
    settings: Settings = field(default_factory=Settings)
    samples: int = option(64, "Calibration samples.", ge=1)
    length: int = option(256, "Their length.", unit="tokens", ge=2)


def run(inputs: Inputs, options: CompressOptions, out: Path, progress: Progress) -> None:
    """inputs: model, ir (an engine's folder in fp32), optional calibration. Writes an engine's folder."""
    import openvino as ov

    from pipeline.stages.checkpoint import read_json
    from pipeline.stages.openvino.calibration import samples
    from pipeline.stages.openvino.file import XML, save
    from pipeline.stages.openvino.layout import complete, describe
    from pipeline.stages.openvino.nncf import nncf

    engine = read_json(inputs["ir"] / "engine.json")
    told, decoder = options.compression, engine["kind"] == "decoder"
    model = ov.Core().read_model(inputs["ir"] / XML)
    arguments: dict[str, Any] = {"mode": _mode(options)}
    if options.precision == "int4":
        arguments |= {
            "group_size": told.group_size,
            "ratio": told.ratio,
            "all_layers": told.head == "int4",
            "backup_mode": nncf().BackupMode(told.backup),
        }
        if told.data_aware:
            names = [port.get_any_name() for port in model.inputs]
            found = list(samples(inputs, engine, names, options.samples, options.length))
            arguments |= {
                "dataset": nncf().Dataset(found),
                "subset_size": len(found),
                "awq": told.awq,
                "scale_estimation": told.scale_estimation,
                "gptq": told.gptq,
            }
    progress(0, 2, "compress")
    try:
        model = nncf().compress_weights(model, **arguments)
    except (nncf().ValidationError, nncf().ParameterNotSupportedError, nncf().InvalidGroupSizeError) as error:
        raise StageError(f"NNCF refuses: {error}", hint="change `quantize` of the target") from error
    progress(1, 2, "write")
    describe(model, options.settings, options.precision, decoder=decoder)
    save(model, out)
    steps = [name for name in ("awq", "scale_estimation", "gptq") if getattr(told, name)]
    complete(
        out,
        inputs["model"],
        inputs.get("tokenizer"),
        engine,
        options.settings,
        precision=options.precision,
        quantization={"format": "nncf", **asdict(told), "method": "+".join(steps) or "rtn"},
    )
    progress(2, 2, "write")


def _mode(options: CompressOptions) -> Any:
    from pipeline.stages.openvino.nncf import nncf

    if options.precision == "int8":
        return nncf().CompressWeightsMode(options.compression.backup)
    return nncf().CompressWeightsMode("int4_sym" if options.compression.symmetric else "int4_asym")


STAGE = Stage(
    "openvino.compress",
    run,
    version=1,
    tools=("numpy", "openvino", "nncf"),
    scope="isa",
    memory=holding(700, weights=3),
)
"""NNCF runs the model where a method asks for activations: their last digits depend on the CPU."""
