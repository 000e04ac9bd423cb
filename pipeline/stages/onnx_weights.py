"""Stage onnxruntime.weights: give an exported graph its weights at a precision, tensor by tensor.

fp32 copies; int8 and int4 replace matrix products by com.microsoft MatMulNBits. Weights stream from the checkpoint (or
the export's data file) through a slice of memory into the final file, so a model needs about a slice more memory than
its largest tensor quantized, not a copy of itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from pathlib import Path

from pipeline.recipe import option
from pipeline.step import Inputs, Progress, Stage


@dataclass(frozen=True, kw_only=True)
class WeightOptions:
    """How weights are stored."""

    precision: Literal["fp32", "int8", "int4"] = option("fp32", "Type of the weights of matrix products.")
    group_size: int = option(32, "int8, int4: how many weights share a scale; a power of two.", ge=16, le=256)
    symmetric: bool = option(True, "int8, int4: no zero points. False stores one with every scale.")
    algorithm: Literal["rtn", "k_quant", "k_quant_mixed"] = option(
        "rtn",
        "int8, int4: round to nearest; a search for the best scale of every block; or that search with 8 bits where "
        "4 hurt most (values, down projections of the outer and every third layer, the head).",
    )
    accuracy_level: int = option(4, "int8, int4: 4 multiplies with int8 activations, 0 with fp32.", ge=0, le=4)
    head: Literal["same", "int8", "int4", "fp32"] = option(
        "same", "int8, int4: type of the product that makes the logits; `same` as the others."
    )
    embeddings: Literal["keep", "same", "int8", "int4"] = option(
        "keep",
        "int8, int4: type of the embedding table. `keep` leaves the checkpoint's 16 or 32 bits. A tied table of the "
        "head's type shares the head's bytes.",
    )
    exclude: tuple[str, ...] = option(
        tuple, "int8, int4: products to leave in fp32, by name; `*` and `?` as in file names.", example="[*.down_proj]"
    )
    threads: int = option(0, "Threads of ONNX Runtime GenAI; 0 is all physical cores of the machine it runs on.", ge=0)


def run(inputs: Inputs, options: WeightOptions, out: Path, progress: Progress) -> None:
    """inputs: export, model, optional calibration. Writes an engine folder."""
    from pipeline.stages.checkpoint import read_json
    from pipeline.stages.genai_layout import copy_model_files, write_engine, write_genai_config
    from pipeline.stages.onnx_place import Placer

    export = read_json(inputs["export"] / "export.json")
    facts = {}
    for component, file in export["components"].items():
        placer = Placer(inputs["export"] / file, inputs["model"], options)
        facts[component] = placer.write(out / file, progress)
    copy_model_files(inputs["model"], out)
    if export["kind"] == "decoder":
        file = export["components"]["model"]
        write_genai_config(out, export, inputs["model"], threads=options.threads, file=file)
    quantization = None
    if options.precision in ("int8", "int4"):
        only = next(iter(facts.values())) if len(facts) == 1 else {"components": facts}
        quantization = {
            "method": options.algorithm,
            "format": "MatMulNBits",
            "group_size": options.group_size,
            "symmetric": options.symmetric,
            "accuracy_level": options.accuracy_level,
            **only,
        }
    settings = {"threads": options.threads}
    write_engine(out, export, precision=options.precision, quantization=quantization, settings=settings)


STAGE = Stage("onnxruntime.weights", run, version=1, tools=("numpy", "onnx"))
