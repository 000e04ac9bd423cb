"""Target `onnxruntime`: decoders, encoders, sequence-to-sequence and speech for ONNX Runtime, on CPU or CUDA.

A decoder's folder loads in ONNX Runtime, in ONNX Runtime GenAI and in Optimum's ORTModel as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from pipeline.engine import Engine
from pipeline.errors import EnginewrightError, RecipeError, UnavailableError
from pipeline.frozen import frozen
from pipeline.hardware import Hardware, Verdict, no_cuda, probe
from pipeline.recipe import TargetOptions, Task, option
from pipeline.size import holding
from pipeline.stages import measure
from pipeline.stages.onnx import encoder as onnx_encoder
from pipeline.stages.onnx import encoder_families as onnx_encoder_families
from pipeline.stages.onnx import fused as onnx_fused
from pipeline.stages.onnx import int8 as onnx_int8
from pipeline.stages.onnx import optimum as onnx_optimum
from pipeline.stages.onnx import torch as onnx_torch
from pipeline.stages.onnx import weights as onnx_weights
from pipeline.stages.onnx.families import read_decoder
from pipeline.step import Inputs, Progress, Stage, Step
from pipeline.targets import Facts, Job
from pipeline.targets.common import (
    compares_unquantized,
    fetch_data,
    fetch_model,
    golden_step,
    parity_step,
    reference_steps,
)
from pipeline.targets.ort_settings import CPU, CUDA

EXTRA = "onnxruntime"
OPENER = "pipeline.targets.ort_engine:open_engine"
PROVIDERS = {"cpu": CPU, "cuda": CUDA}


@frozen(kw_only=True)
class Options(TargetOptions):
    """What an ONNX Runtime target can be asked for."""

    precision: Literal["fp32", "fp16", "int8", "int4"] = option("fp32", "Type of the weights.")
    scheme: Literal["auto", "weights", "activations"] = option(
        "auto",
        "int8: quantize the weights alone in small groups (nearest to fp32, fastest for decoding), or weights and "
        "activations (fastest for encoders). `auto`: weights for decoders, activations for the rest. int4 is weights.",
    )
    quantize: onnx_weights.Nbits = option(onnx_weights.Nbits, "Scheme `weights`: how.")
    int8: onnx_int8.Int8 = option(onnx_int8.Int8, "Scheme `activations`: how.")
    exporter: Literal["auto", "fused", "torch", "optimum"] = option(
        "auto",
        "Who writes the graph: our fused builder (the families that it knows: the fastest graph of a decoder, and no "
        "torch is loaded), torch's exporter (whatever transformers loads), or Optimum in its own toolchain. `auto`: "
        "fused if it can, else torch.",
    )
    provider: Literal["cpu", "cuda"] = option("cpu", "ONNX Runtime's execution provider.")
    threads: int = option(0, "Threads of one engine; 0 is all physical cores of the machine it runs on.", ge=0)


def why_not(kind: str, config: Mapping[str, Any], hardware: Hardware) -> str | None:
    """Every kind of model, on every CPU."""
    return None


def measure_engine(inputs: Inputs, options: measure.MeasureOptions, out: Path, progress: Progress) -> None:
    """The parity stage, keyed by the runtime that answers."""
    measure.run(inputs, options, out, progress)


PARITY = Stage(
    "onnxruntime.parity", measure_engine, tools=("onnxruntime",), scope="isa", memory=holding(200, weights=1, logits=3)
)
PARITY_CUDA = Stage(
    "onnxruntime.parity",
    measure_engine,
    tools=("onnxruntime-gpu",),
    scope="device",
    memory=holding(200, weights=1, logits=3),
)


def steps(job: Job, name: str, options: Options, hardware: Hardware) -> tuple[Step, ...]:
    """fetch, reference, export, engine, parity; what is quantized is held against the reference before that, too.

    An engine for CUDA is judged here only if this machine has such a device: elsewhere its parity is deferred.
    """
    common = (fetch_model(job), *reference_steps(job), _export(job, options))
    engine = _engine(job, options, hardware)
    gpu = options.provider == "cuda"
    if gpu and no_cuda(probe()):
        return (*common, *engine, golden_step(job))
    stage = PARITY_CUDA if gpu else PARITY
    settings = {"threads": options.threads, "provider": PROVIDERS[options.provider]}
    unquantized: tuple[Step, ...] = ()
    if options.precision in ("int8", "int4") and not gpu and compares_unquantized(job, options):
        plain = _weights("unquantized", options, precision="fp32")
        unquantized = (plain, parity_step(stage, OPENER, settings, engine="unquantized"))
    return (
        *common,
        *unquantized,
        *engine,
        parity_step(stage, OPENER, settings, precision=options.precision),
        golden_step(job),
    )


def _engine(job: Job, options: Options, hardware: Hardware) -> tuple[Step, ...]:
    """The step `engine`, and the one that fetches the calibration data if it needs them."""
    scheme = options.scheme
    if scheme == "auto":
        scheme = "activations" if options.precision == "int8" and job.kind != "decoder" else "weights"
    if scheme == "weights":
        return (_weights("engine", options, precision=options.precision),)
    if options.precision != "int8":
        raise RecipeError(f"scheme: activations is for int8, not {options.precision}", hint="leave `scheme` out")
    told = onnx_int8.Int8Options(**vars(options.int8))
    if told.reduce_range is None:
        told = replace(told, reduce_range=onnx_int8.saturates(hardware))
    needs = {"export": "export", "model": "model"}
    if options.int8.mode == "dynamic":
        return (Step("engine", onnx_int8.STAGE, told, needs),)
    data = job.recipe.calibration
    if data is None:
        raise RecipeError(
            "int8.mode: static measures the range of activations on calibration data, and the recipe names none",
            hint="add a `calibration:` section with `path:`, or use `mode: dynamic`",
        )
    told = replace(told, samples=data.samples, length=data.length)
    step = Step("engine", onnx_int8.STAGE, told, {**needs, "calibration": "calibration"})
    return (*fetch_data(job, "calibration"), step)


def _weights(name: str, options: Options, precision: Literal["fp32", "fp16", "int8", "int4"]) -> Step:
    """An engine by its weights alone; what only quantized weights need stays out of the key of the others."""
    chosen = vars(options.quantize) if precision in ("int8", "int4") else {}
    if chosen and options.provider == "cuda":
        chosen = {**chosen, "activations": "fp16"}  # attention with a cache knows no other type there
    told = onnx_weights.WeightOptions(precision=precision, provider=options.provider, threads=options.threads, **chosen)
    return Step(name, onnx_weights.STAGE, told, {"export": "export", "model": "model"})


def _export(job: Job, options: Options) -> Step:
    """The exporter's step; `auto` is decided here, from config.json, so that the plan shows it."""
    exporter, task = options.exporter, cast(Task, job.task)
    problem = _fused_problem(job, options) if exporter in ("auto", "fused") else None
    if exporter == "auto":
        exporter = "torch" if problem else "fused"
    if exporter == "fused":
        if problem:
            raise problem
        if job.kind == "encoder":
            return Step("export", onnx_encoder.STAGE, onnx_encoder.EncoderOptions(task=task), {"model": "model"})
        return Step("export", onnx_fused.STAGE, onnx_fused.FusedOptions(), {"model": "model"})
    trusted = job.recipe.model.trust_remote_code
    if exporter == "optimum":
        if job.kind == "seq2seq":
            raise RecipeError(
                "exporter: optimum builds no encoder-decoders here", hint="leave `exporter` out, or say `torch`"
            )
        asked = onnx_optimum.OptimumOptions(task=task, trust_remote_code=trusted)
        return Step("export", onnx_optimum.STAGE, asked, {"model": "model"})
    told = onnx_torch.TorchExportOptions(task=task, trust_remote_code=trusted)
    return Step("export", onnx_torch.STAGE, told, {"model": "model"})


def _fused_problem(job: Job, options: Options) -> EnginewrightError | None:
    """Why our builder cannot write the graph; None where it can."""
    if job.kind == "encoder":
        return onnx_encoder_families.why_not(job.config, job.task)
    if job.kind != "decoder":
        return RecipeError("exporter: fused builds no encoder-decoders", hint="leave `exporter` out, or say `torch`")
    try:
        read_decoder(job.config)
    except UnavailableError as error:
        return error
    if options.provider == "cuda" and options.precision == "fp32":
        return RecipeError("exporter: fused knows no fp32 on CUDA", hint="say `precision: fp16`, or leave it out")
    return None


def facts(engine: Mapping[str, Any], options: Options, hardware: Hardware) -> Facts:
    """Served by ONNX Runtime, or as an ONNX Runtime GenAI folder where it has a genai_config.json."""
    decoder = engine["kind"] == "decoder"
    gpu = options.provider == "cuda"
    requires = {"onnxruntime-gpu" if gpu else "onnxruntime": "1.30"}
    return Facts(
        requires=requires,
        layout="onnxruntime-genai" if decoder else "onnx",
        entry="." if decoder else next(iter(engine["components"].values())),
        command=("enginewright", "generate", "."),
        device=options.provider,
        isa=(),
    )


def open(engine: Path, hardware: Hardware) -> Engine:
    """An Engine over ONNX Runtime for an engine's folder or an artifact."""
    from pipeline.targets.ort_engine import open_engine

    return open_engine(engine)


def can_run(manifest: Mapping[str, Any], hardware: Hardware) -> Verdict:
    """Any CPU that ONNX Runtime is built for; an artifact for CUDA needs such a device."""
    device = manifest["target"]["device"]["kind"]
    if device == "cuda" and (reason := no_cuda(hardware)):
        return Verdict(False, reason)
    return Verdict(True, f"ONNX Runtime runs it on the {device}")
