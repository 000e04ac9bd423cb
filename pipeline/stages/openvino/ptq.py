"""Stage openvino.ptq: full int8 of an encoder, weights and activations, by NNCF on the recipe's calibration data."""

from __future__ import annotations

from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import StageError
from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.size import holding
from pipeline.stages.openvino.settings import Settings
from pipeline.step import Inputs, Progress, Stage


@frozen(kw_only=True)
class Ptq:
    """How an encoder is quantized."""

    preset: Literal["mixed", "performance"] = option(
        "mixed", "int8: activations with zero points where they need them, or all symmetric."
    )
    fast_bias_correction: bool = option(True, "int8: correct biases from averages instead of layer by layer.")
    smooth_quant_alpha: float = option(
        0.95, "int8: how much of the activations' range moves into the weights; -1 switches it off.", ge=-1, le=1
    )
    max_drop: float | None = option(
        None,
        "int8: accuracy control. Layers go back to fp32, the worst first, until the mean cosine to the unquantized "
        "engine, on the second half of the calibration data, is at most this far from 1.",
        ge=0,
        le=1,
        example="0.005",
    )


@frozen(kw_only=True)
class PtqOptions(Ptq):
    """How, on how much data, and how it will run."""

    settings: Settings = field(default_factory=Settings)
    samples: int = option(128, "Calibration samples.", ge=2)
    length: int = option(128, "Their length at most.", unit="tokens", ge=2)


def run(inputs: Inputs, options: PtqOptions, out: Path, progress: Progress) -> None:
    """inputs: model, ir (an engine's folder in fp32), calibration. Writes an engine's folder."""
    import openvino as ov

    from pipeline.stages.checkpoint import read_json
    from pipeline.stages.openvino.calibration import samples
    from pipeline.stages.openvino.file import XML, save
    from pipeline.stages.openvino.layout import complete, describe
    from pipeline.stages.openvino.nncf import nncf

    engine = read_json(inputs["ir"] / "engine.json")
    model = ov.Core().read_model(inputs["ir"] / XML)
    names = [port.get_any_name() for port in model.inputs]
    found = list(samples(inputs, engine, names, options.samples, options.length))
    progress(0, 2, "quantize")
    advanced = nncf().AdvancedQuantizationParameters(
        smooth_quant_alphas=nncf().AdvancedSmoothQuantParameters(matmul=options.smooth_quant_alpha)
    )
    arguments: dict[str, Any] = {
        "preset": nncf().QuantizationPreset(options.preset),
        "model_type": nncf().ModelType.TRANSFORMER,
        "fast_bias_correction": options.fast_bias_correction,
    }
    try:
        if options.max_drop is None:
            dataset = nncf().Dataset(found)
            model = nncf().quantize(model, dataset, subset_size=len(found), advanced_parameters=advanced, **arguments)
        else:
            model = _controlled(model, found, options.max_drop, advanced, arguments)
    except (nncf().ValidationError, nncf().ParameterNotSupportedError) as error:
        raise StageError(f"NNCF refuses: {error}", hint="change `ptq` of the target") from error
    progress(1, 2, "write")
    describe(model, options.settings, "int8", decoder=False)
    save(model, out)
    told = {name: value for name, value in asdict(options).items() if name in Ptq.__dataclass_fields__}
    quantized = sum(node.get_type_name() == "FakeQuantize" for node in model.get_ops())
    complete(
        out,
        inputs["model"],
        inputs.get("tokenizer"),
        engine,
        options.settings,
        precision="int8",
        quantization={"method": "ptq", "format": "FakeQuantize", **told, "quantizers": quantized},
    )
    progress(2, 2, "write")


def _controlled(
    model: Any, found: list[dict[str, Any]], max_drop: float, advanced: Any, arguments: dict[str, Any]
) -> Any:
    """Calibrate on the first half of the samples, and judge on the second by the cosine to the unquantized model."""
    import numpy as np
    import openvino as ov

    from pipeline.stages.openvino.nncf import nncf

    first, second = found[: len(found) // 2], found[len(found) // 2 :]
    plain = {"INFERENCE_PRECISION_HINT": "f32"}
    before = ov.Core().compile_model(model, "CPU", plain)
    name = before.outputs[-1].get_any_name()
    judged = [(sample, np.asarray(before(sample)[name]).reshape(-1)) for sample in second]

    def cosine(compiled: Any, items: Any) -> tuple[float, list[float]]:
        """NNCF asks for all of `judged`, or for some to rank the layers by."""
        values = []
        for sample, wanted in items:
            got = np.asarray(compiled(sample)[name]).reshape(-1)
            values.append(float(got @ wanted / (np.linalg.norm(got) * np.linalg.norm(wanted))))
        return float(np.mean(values)), values

    return nncf().quantize_with_accuracy_control(
        model,
        calibration_dataset=nncf().Dataset(first),
        validation_dataset=nncf().Dataset(judged, lambda item: item[0]),
        validation_fn=cosine,
        max_drop=max_drop,
        drop_type=nncf().DropType.ABSOLUTE,
        subset_size=len(first),
        advanced_quantization_parameters=advanced,
        **arguments,
    )


STAGE = Stage(
    "openvino.ptq", run, version=1, tools=("numpy", "openvino", "nncf"), scope="isa", memory=holding(500, weights=2.5)
)
"""NNCF runs the model to observe its activations: their last digits depend on the CPU."""
