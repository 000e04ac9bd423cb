"""Quantize the graphs of an export to int8 and make the engine's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError
from pipeline.stages.checkpoint import read_json
from pipeline.stages.genai_layout import copy_model_files, write_engine
from pipeline.stages.onnx.int8 import Int8Options
from pipeline.stages.onnx.int8_graph import Int8Graph
from pipeline.stages.onnx.int8_observe import Observed, observe
from pipeline.step import Inputs, Progress


def build(inputs: Inputs, options: Int8Options, out: Path, progress: Progress) -> None:
    """Write the quantized components, the model's own files and engine.json.

    RecipeError when the mode needs calibration data that are not there, or does not suit the model.
    """
    export = read_json(inputs["export"] / "export.json")
    if export["kind"] == "decoder":
        raise RecipeError(
            "onnxruntime.encoder does not build decoders", hint="stage onnxruntime.weights quantizes them"
        )
    if options.mode == "static":
        _check_calibration(inputs, export)
    facts: dict[str, Any] = {}
    for component, file in export["components"].items():
        progress(len(facts), len(export["components"]), component)
        graph = Int8Graph(inputs["export"] / file, inputs["model"], options)
        observed: dict[str, Observed] = {}
        if options.mode == "static":
            observed = observe(inputs["export"] / file, list(graph.activations), inputs, options, progress)
        facts[component] = graph.write(out / file, observed)
    copy_model_files(inputs["model"], out)
    quantization = {
        "method": options.mode,
        "format": "QDQ" if options.mode == "static" else "QOperator",
        "per_channel": options.per_channel,
        "reduce_range": options.reduce_range,
        **(facts["model"] if list(facts) == ["model"] else {"components": facts}),
    }
    if options.mode == "static":
        quantization |= {"calibration": options.calibration, "activations": options.activations}
    write_engine(out, export, precision="int8", quantization=quantization, settings={})


def _check_calibration(inputs: Inputs, export: dict[str, Any]) -> None:
    if export["kind"] != "encoder":
        raise RecipeError("mode: static does not build encoder-decoders", hint="use mode: dynamic")
    if export["interface"]["inputs"][0]["name"] != "input_ids":
        raise RecipeError(
            f"mode: static: calibration data are text, and the model takes {export['interface']['inputs'][0]['name']}",
            hint="use mode: dynamic, which needs none",
        )
    if "calibration" not in inputs:
        raise RecipeError("mode: static: the recipe has no calibration data", hint="add `calibration:` with a path")
