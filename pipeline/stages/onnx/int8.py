"""Stage onnxruntime.encoder: int8 for encoders, and for the two graphs of encoder-decoders, where prompts are long.

Weights and activations are int8, so a product of many rows runs on integer instructions; MatMulNBits of stage
onnxruntime.weights keeps activations in finer blocks, is nearer to fp32, and half as fast. Convolutions stay fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pipeline.frozen import frozen
from pipeline.hardware import Hardware
from pipeline.recipe import option
from pipeline.size import holding
from pipeline.step import Inputs, Progress, Stage

if TYPE_CHECKING:
    from pathlib import Path

_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}


@frozen(kw_only=True)
class Int8:
    """How an encoder is quantized. fp32 and fp16 are onnxruntime.weights' own.

    Measured: all-MiniLM-L6-v2, 96 held-out sentences in batches of 8, one thread with AVX512-VNNI; cosine to fp32:

    | int8 | sentences/s | cosine mean | cosine min |
    |---|---|---|---|
    | (fp32) | 116 | | |
    | **dynamic** | **324** | **0.9928** | **0.985** |
    | dynamic, a scale a tensor | 321 | 0.9636 | 0.919 |
    | static, minmax | 318 | 0.9925 | 0.983 |
    | static, percentile 99.99 | 318 | 0.9921 | 0.980 |
    | static, entropy | 315 | 0.8693 | 0.778 |
    | (onnxruntime.weights: MatMulNBits, group 32) | 142 | 0.9997 | 0.9991 |
    """

    mode: Literal["dynamic", "static"] = option(
        "dynamic",
        "int8: the range of activations is measured while it runs, or beforehand on the recipe's calibration data "
        "(Q/DQ nodes, which other runtimes read, too).",
    )
    calibration: Literal["minmax", "entropy", "percentile"] = option(
        "minmax", "static: what the range covers: all values, those that keep most information, or a share of them."
    )
    percentile: float = option(99.99, "static, percentile: how many of the values.", unit="%", ge=90, le=100)
    per_channel: bool = option(True, "int8: a scale for every output channel of a weight instead of one for it all.")
    activations: Literal["uint8", "int8"] = option(
        "uint8", "static: type of the activations: with a zero point, or symmetric (for TensorRT)."
    )
    reduce_range: bool | None = option(
        None,
        "int8: weights of 7 bits. x86 CPUs without VNNI add products in 16 bits, which saturate with 8. `null`: if "
        "the CPU of the target's `hardware` is such a one.",
    )
    embeddings: bool = option(True, "int8: embedding tables, too, with a scale for every row.")
    exclude: tuple[str, ...] = option(
        tuple, "int8: products to leave in fp32, by name; `*` and `?` as in file names.", example='["*layer.0.output*"]'
    )


@frozen(kw_only=True)
class Int8Options(Int8):
    """The precision of an engine, and for int8 how it is reached."""

    precision: Literal["fp32", "fp16", "int8"] = option("int8", "Type of weights and activations of matrix products.")
    samples: int = option(128, "How many calibration samples are taken.", ge=1)
    length: int = option(128, "Where a calibration sample is cut.", unit="tokens", ge=2)


def saturates(hardware: Hardware) -> bool:
    """Whether the CPU adds products of 8 bits in 16, as x86 does without VNNI."""
    return hardware.arch == "x86_64" and not _VNNI & set(hardware.isa)


def run(inputs: Inputs, options: Int8Options, out: Path, progress: Progress) -> None:
    """inputs: export, model, optional calibration. Writes an engine folder; see onnx_int8_engine."""
    from pipeline.stages.onnx import int8_engine as onnx_int8_engine
    from pipeline.stages.onnx import weights as onnx_weights

    if options.precision == "int8":
        onnx_int8_engine.build(inputs, options, out, progress)
    else:
        onnx_weights.run(inputs, onnx_weights.WeightOptions(precision=options.precision), out, progress)


STAGE = Stage(
    "onnxruntime.encoder",
    run,
    version=1,
    tools=("numpy", "onnx", "onnxruntime", "tokenizers"),
    memory=holding(80, weights=0.9),
)
