"""Stage onnxruntime.weights: give an exported graph its weights at a precision, tensor by tensor.

fp32 copies; int8 and int4 replace matrix products by com.microsoft MatMulNBits. Weights stream from the checkpoint (or
the export's data file) through a slice of memory into the final file, so a model needs about a slice more memory than
its largest tensor quantized, not a copy of itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipeline.errors import RecipeError
from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.size import placing_blocks
from pipeline.step import Inputs, Progress, Stage

GROUPS = (16, 32, 64, 128, 256)


@frozen(kw_only=True)
class Nbits:
    """How weights are stored.

    The defaults of int4 (groups of 32 with zero points, head and embeddings int8) are the best of what was measured:
    KL divergence of pydoc-llama on held-out text, and tokens a second of a 0.5B model in GenAI, 2 threads, batch 1.

    | int4 | head and embeddings | KLD | tokens/s |
    |---|---|---|---|
    | group 32, symmetric | int4, 16 bits | 3.7e-3 | 75 |
    | group 32 | int4, 16 bits | 3.2e-3 | 77 |
    | **group 32** | **int8** | **1.1e-3** | **74** |
    | group 64 | int8 | 1.4e-3 | 83 |
    | group 128 | int8 | 1.7e-3 | 102 |

    accuracy_level 4 (int8 activations) against 0 (fp32): 77 against 42 tokens/s, KLD 3.72e-3 against 3.68e-3.
    int8, group 32 against 128: KLD 5.5e-5 against 1.0e-4, 62 against 80 tokens/s.
    """

    group_size: int = option(32, "int8, int4: how many weights share a scale: 16, 32, 64, 128 or 256.", ge=16, le=256)
    symmetric: bool = option(
        False, "int8, int4: no zero points. False stores one with each scale, at no cost in speed."
    )
    algorithm: Literal["rtn", "k_quant", "k_quant_mixed"] = option(
        "rtn",
        "int8, int4: round to nearest; a search for the best scale of every block; or that search with 8 bits where "
        "4 hurt most (values and down projections of the outer and every third layer).",
    )
    accuracy_level: int = option(4, "int8, int4: 4 multiplies with int8 activations, 0 with fp32.", ge=0, le=4)
    head: Literal["same", "int8", "int4", "fp32"] = option(
        "int8", "int8, int4: type of the product that makes the logits; `same` as the others."
    )
    embeddings: Literal["keep", "same", "int8", "int4"] = option(
        "int8",
        "int8, int4: type of the embedding table. `keep` leaves the checkpoint's 16 or 32 bits. A tied table of the "
        "head's type shares the head's bytes.",
    )
    exclude: tuple[str, ...] = option(
        tuple,
        "int8, int4: products to leave in fp32, by name; `*` and `?` as in file names.",
        example='["*.down_proj"]',
    )
    activations: Literal["fp32", "fp16"] = option(
        "fp32",
        "int8, int4: type of what flows between products and of the caches. CUDA's GroupQueryAttention wants fp16, a "
        "CPU is fastest with fp32. Precision fp16 implies fp16.",
    )

    def __post_init__(self) -> None:
        if self.group_size not in GROUPS:
            raise RecipeError(
                f"group_size is {self.group_size}; MatMulNBits knows {', '.join(map(str, GROUPS))}",
                hint="choose one of them",
            )


@frozen(kw_only=True)
class WeightOptions(Nbits):
    """The precision of an engine, and for int8 and int4 how it is reached."""

    precision: Literal["fp32", "fp16", "int8", "int4"] = option("fp32", "Type of the weights of matrix products.")
    provider: Literal["cpu", "cuda"] = option("cpu", "Execution provider that genai_config.json names.")
    threads: int = option(0, "Threads of ONNX Runtime GenAI; 0 is all physical cores of the machine it runs on.", ge=0)


def run(inputs: Inputs, options: WeightOptions, out: Path, progress: Progress) -> None:
    """inputs: export, model, optional calibration. Writes an engine folder."""
    from pipeline.stages.checkpoint import read_json
    from pipeline.stages.genai_layout import copy_model_files, write_engine, write_genai_config
    from pipeline.stages.onnx.place import Placer

    export = read_json(inputs["export"] / "export.json")
    facts, names = {}, {}
    for component, file in export["components"].items():
        placer = Placer(inputs["export"] / file, inputs["model"], options)
        facts[component] = placer.write(out / file, progress)
        names[component] = placer.inputs
    copy_model_files(inputs["model"], out)
    if export["kind"] == "decoder":
        file, positions = export["components"]["model"], "position_ids" in names["model"]
        write_genai_config(
            out,
            export,
            inputs["model"],
            threads=options.threads,
            provider=options.provider,
            file=file,
            positions=positions,
        )
    quantization = None
    if options.precision in ("int8", "int4"):
        only = next(iter(facts.values())) if len(facts) == 1 else {"components": facts}
        quantization = {
            "method": options.algorithm,
            "format": "MatMulNBits",
            "group_size": options.group_size,
            "head": options.head,
            "embeddings": options.embeddings,
            "symmetric": options.symmetric,
            "accuracy_level": options.accuracy_level,
            "activations": options.activations,
            **only,
        }
    settings = {"threads": options.threads}
    write_engine(out, export, precision=options.precision, quantization=quantization, settings=settings)


STAGE = Stage("onnxruntime.weights", run, version=1, tools=("numpy", "onnx"), memory=placing_blocks)
