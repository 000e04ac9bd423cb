"""Stage openvino.decoder: a decoder of a known family as a stateful OpenVINO model, its weights streamed and rounded.

Nothing is traced and nothing loaded whole. Measured on the shape of Qwen2.5-0.5B, int4: 7 CPU s and 113 MB, where
optimum-intel takes 32 CPU s and 2343 MB.
"""

from __future__ import annotations

from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import RecipeError
from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.size import holding
from pipeline.stages.openvino.settings import Settings
from pipeline.step import Inputs, Progress, Stage

GROUPS = (16, 32, 64, 128, 256)


@frozen(kw_only=True)
class Compression:
    """How weights are stored at int8 and int4.

    Mean KL divergence of pydoc-llama on 16 held-out windows, head and embeddings int8, executed in f32:

    | int4 | symmetric | with zero points |
    |---|---|---|
    | group 32 | 1.14e-3 | **1.04e-3** |
    | group 64 | 1.30e-3 | 1.40e-3 |
    | group 128 | 1.57e-3 | 1.57e-3 |

    int8, a scale a row: 3.4e-5.
    """

    group_size: int = option(32, "int4: how many weights share a scale: 16, 32, 64, 128 or 256.", ge=16, le=256)
    symmetric: bool = option(False, "int4: no zero points.")
    head: Literal["int8", "int4"] = option("int8", "int4: type of the product that makes the logits.")
    embeddings: Literal["int8", "int4"] = option("int8", "int4: type of the embedding table.")
    backup: Literal["int8_asym", "int8_sym"] = option(
        "int8_asym", "int8, and whatever int4 leaves out: with a zero point a row, or symmetric."
    )
    awq: bool = option(False, "int4, by NNCF: scale the channels that activations make important, on calibration data.")
    scale_estimation: bool = option(False, "int4, by NNCF: fit every scale to the layer's output on calibration data.")
    gptq: bool = option(False, "int4, by NNCF: round a column at a time, the error spread over the rest.")
    ratio: float = option(
        1.0, "int4, by NNCF: share of the weights in int4; the layers that it hurts most get `backup`.", ge=0, le=1
    )

    def __post_init__(self) -> None:
        if self.group_size not in GROUPS:
            raise RecipeError(
                f"group_size is {self.group_size}; it can be {', '.join(map(str, GROUPS))}", hint="choose one of them"
            )

    @property
    def data_aware(self) -> bool:
        """Whether it is more than rounding to nearest, which needs calibration data and NNCF."""
        return self.awq or self.scale_estimation or self.gptq or self.ratio < 1


@frozen(kw_only=True)
class DecoderOptions:
    """The precision of the weights, how it is reached, and how they will run."""

    precision: Literal["fp32", "fp16", "bf16", "int8", "int4"] = option("fp32", "Type of the weights.")
    compression: Compression | None = None
    settings: Settings = field(default_factory=Settings)
    context_length: int | None = option(
        None, "Longest context that the engine serves. Not given: what config.json says.", unit="tokens", ge=1
    )


def run(inputs: Inputs, options: DecoderOptions, out: Path, progress: Progress) -> None:
    """inputs: model, optional tokenizer. Writes an engine's folder."""
    from pipeline.stages.checkpoint import Checkpoint
    from pipeline.stages.decoder_export import decoder_export, served_context
    from pipeline.stages.onnx.families import read_decoder
    from pipeline.stages.openvino.decoder import build_decoder
    from pipeline.stages.openvino.file import Ghosts
    from pipeline.stages.openvino.layout import complete, describe
    from pipeline.stages.openvino.place import Placer

    checkpoint = Checkpoint(inputs["model"])
    decoder = read_decoder(checkpoint.config)
    context = served_context(decoder, options.context_length)
    ghosts = Ghosts()
    forms, fallback = _forms(options)
    placer = Placer(ghosts, forms, fallback)
    model = build_decoder(decoder, checkpoint, placer)
    describe(model, options.settings, options.precision, decoder=True)
    ghosts.write(model, out, lambda target: placer.fill(target, progress))
    quantization = None
    if options.compression is not None:
        quantization = {
            "method": "rtn",
            "format": "nncf",
            **{
                name: value for name, value in asdict(options.compression).items() if name in _STATED[options.precision]
            },
            "weights": placer.counts(),
        }
    export = decoder_export(decoder, inputs["model"], exporter="direct", cache="stateful", context=context)
    complete(
        out,
        inputs["model"],
        inputs.get("tokenizer"),
        export,
        options.settings,
        precision=options.precision,
        quantization=quantization,
    )


_STATED = {"int8": ("backup",), "int4": ("group_size", "symmetric", "head", "embeddings", "backup")}


def _forms(options: DecoderOptions) -> tuple[dict[str, Any], Any]:
    """Form by role, and what a weight gets that the groups do not fit."""
    from pipeline.stages.openvino.place import FLOATS, Form

    if options.precision in FLOATS:
        plain = Form(FLOATS[options.precision])
        return dict.fromkeys(("linear", "head", "embedding"), plain), plain
    told = options.compression or Compression()
    int8 = Form(bits=8, symmetric=told.backup == "int8_sym")
    if options.precision == "int8":
        return dict.fromkeys(("linear", "head", "embedding"), int8), int8
    int4 = Form(bits=4, group=told.group_size, symmetric=told.symmetric)
    chosen = {"int8": int8, "int4": int4}
    return {"linear": int4, "head": chosen[told.head], "embedding": chosen[told.embeddings]}, int8


STAGE = Stage("openvino.decoder", run, version=1, tools=("numpy", "openvino"), memory=holding(130, largest=0.6))
