"""Stage tensorrt.graph: give an exported graph the types that TensorRT compiles: fp32, fp16, bf16, or Q/DQ nodes.

TensorRT takes precision from the graph and nowhere else. int8 and fp8 quantize weights and activations by Q/DQ nodes
whose scales are measured on the recipe's calibration data; int4 quantizes weights in blocks. What is not quantized is
fp16. No product is ever given a scale that no data supports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipeline.errors import RecipeError
from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.size import placing
from pipeline.step import Inputs, Progress, Stage

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8"]
CALIBRATED = ("int8", "fp8")
QUANTIZED = (*CALIBRATED, "int4")


@frozen(kw_only=True)
class Typing:
    """How a graph is quantized."""

    group_size: int = option(32, "int4: how many weights share a scale.", ge=16, le=256)
    search: bool = option(
        True, "int4: look for the scale of every block that loses least, instead of the largest value."
    )
    head: Literal["keep", "same"] = option("keep", "int4: the product that makes the logits: fp16, or as the others.")
    calibration: Literal["minmax", "entropy", "percentile"] = option(
        "percentile",
        "int8, fp8: what the range covers: all values, those that keep most information, or a share of them.",
    )
    percentile: float = option(99.99, "Calibration `percentile`: how many of the values.", unit="%", ge=90, le=100)
    rest: Literal["fp16", "fp32"] = option("fp16", "Type of all that is not quantized.")
    exclude: tuple[str, ...] = option(
        tuple, "Products to leave unquantized, by name; `*` and `?` as in file names.", example="['*layer.0.output*']"
    )

    def __post_init__(self) -> None:
        if self.group_size & (self.group_size - 1):
            raise RecipeError(f"group_size is {self.group_size}, which is no power of 2", hint="choose 32, 64 or 128")


@frozen(kw_only=True)
class GraphOptions(Typing):
    """The precision of a graph, and how it is reached."""

    precision: Precision = option("fp16", "Type of weights and activations.")
    samples: int = option(128, "How many calibration samples are taken.", ge=1)
    length: int = option(128, "Where a calibration sample is cut.", unit="tokens", ge=2)


def run(inputs: Inputs, options: GraphOptions, out: Path, progress: Progress) -> None:
    """inputs: export, model, preflight (for its order only), optional calibration. Writes model.onnx, the model's own
    files and engine.json, as an engine's folder has them."""
    from pipeline.stages.checkpoint import read_json
    from pipeline.stages.genai_layout import copy_model_files, write_engine
    from pipeline.stages.tensorrt.qdq import TypedGraph, ranges

    export = read_json(inputs["export"] / "export.json")
    if list(export["components"]) != ["model"]:
        raise RecipeError("tensorrt.graph types one graph, and this model has several", hint="use another runtime")
    file = export["components"]["model"]
    graph = TypedGraph(inputs["export"] / file, inputs["model"], options)
    observed = ranges(graph, inputs, options, progress) if options.precision in CALIBRATED else {}
    progress(0, 1, "weights")
    facts = graph.write(out / "model.onnx", observed, progress)
    copy_model_files(inputs["model"], out)
    quantization = None
    if options.precision in QUANTIZED:
        quantization = {"format": "DQ" if options.precision == "int4" else "QDQ", "rest": options.rest, **facts}
    write_engine(out, export, precision=options.precision, quantization=quantization, settings={}, runtime="tensorrt")


STAGE = Stage(
    "tensorrt.graph", run, version=1, tools=("numpy", "onnx", "onnxruntime", "ml_dtypes", "tokenizers"), memory=placing
)
