"""Target `openvino`: decoders, encoders, classifiers and vision models for OpenVINO, on CPU, GPU or NPU.

A decoder's folder loads in OpenVINO GenAI's LLMPipeline and in OpenVINO Model Server as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from pipeline import hardware as machines
from pipeline.engine import Engine
from pipeline.errors import RecipeError, UnavailableError
from pipeline.frozen import frozen
from pipeline.hardware import Hardware, Verdict
from pipeline.recipe import Data, TargetOptions, Task, option
from pipeline.size import holding
from pipeline.stages import measure
from pipeline.stages.onnx import torch as onnx_torch
from pipeline.stages.onnx.families import read_decoder
from pipeline.stages.openvino import compile as openvino_compile
from pipeline.stages.openvino import compress as openvino_compress
from pipeline.stages.openvino import convert as openvino_convert
from pipeline.stages.openvino import ptq as openvino_ptq
from pipeline.stages.openvino import tokenizer as openvino_tokenizer
from pipeline.stages.openvino import weights as openvino_weights
from pipeline.stages.openvino.settings import PLAIN, Execution, KvCache, Settings, computes_in
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

EXTRA = "openvino"
OPENER = "pipeline.targets.ov_engine:open_engine"
DEVICES = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}
NO_TEXT = ("image-classification",)


@frozen(kw_only=True)
class Options(TargetOptions):
    """What an OpenVINO target can be asked for."""

    precision: Literal["fp32", "fp16", "bf16", "int8", "int4"] = option("fp32", "Type of the weights.")
    execution: Literal["auto", "f32", "bf16", "f16"] = option(
        "auto",
        "Type of what flows between products (INFERENCE_PRECISION_HINT). `auto`: f32 for fp32; for the rest bf16 (for "
        "fp16: f16) where the CPU computes in it, else f32. engine.json and the manifest say what was chosen.",
    )
    kv_cache: Literal["auto", "f32", "f16", "bf16", "u8"] = option(
        "auto", "Type of a decoder's cache. `auto`: f32 for fp32, 16 bits for fp16 and bf16, u8 for int8 and int4."
    )
    dynamic_quantization: int | Literal["auto"] = option(
        "auto",
        "int8, int4: activations of compressed products in int8 in blocks of this size, where the CPU is faster so; 0 "
        "switches it off. `auto`: 32 for int8 and int4 of decoders.",
        ge=0,
    )
    scheme: Literal["auto", "weights", "activations"] = option(
        "auto",
        "int8: the weights alone (decoders), or weights and activations on calibration data (encoders). `auto` takes "
        "what suits the model. int4 is weights.",
    )
    quantize: openvino_weights.Compression = option(openvino_weights.Compression, "Scheme `weights`: how.")
    ptq: openvino_ptq.Ptq = option(openvino_ptq.Ptq, "Scheme `activations`: how.")
    exporter: Literal["auto", "direct", "torch"] = option(
        "auto",
        "Who writes the model: our builder of stateful OpenVINO models (decoders of the families that it knows), or "
        "torch's ONNX exporter and OpenVINO's reader. `auto`: direct if it can, else torch.",
    )
    device: Literal["cpu", "gpu", "npu"] = option("cpu", "OpenVINO's device.")
    compile: bool | None = option(
        None,
        "Put the compiled engine for this machine beside the IR, when it is built on such a machine. `null`: unless "
        "the model takes more than 8 GiB in fp32, where OpenVINO's compiler would hold it twice in int4.",
    )
    tokenizer: bool = option(True, "Decoders: convert the tokenizer for LLMPipeline and Model Server.")
    threads: int = option(0, "Threads of one engine; 0 is all physical cores of the machine it runs on.", ge=0)


def why_not(kind: str, config: Mapping[str, Any], hardware: Hardware) -> str | None:
    """All but encoder-decoders."""
    return "the openvino target builds no encoder-decoders" if kind == "seq2seq" else None


def measure_engine(inputs: Inputs, options: measure.MeasureOptions, out: Path, progress: Progress) -> None:
    """The parity stage, keyed by the runtime that answers."""
    measure.run(inputs, options, out, progress)


PARITY = Stage(
    "openvino.parity",
    measure_engine,
    tools=("numpy", "openvino"),
    scope="isa",
    memory=holding(250, weights=2.5, logits=3),
)


def steps(job: Job, name: str, options: Options, hardware: Hardware) -> tuple[Step, ...]:
    """fetch, reference, export, ir, engine, parity. What is not fp32 is held against the reference before that, too:
    the conversion alone (`unquantized`), and the engine's weights executed in f32 (`parity.f32`).

    A blob is for a CPU with the features of this one, so it is compiled for no other. An engine for a machine with
    features that this one lacks is not judged here, either: that is deferred.
    """
    if job.kind == "seq2seq":
        raise UnavailableError("the openvino target builds no encoder-decoders", hint="use runtime: onnxruntime")
    settings = _settings(job, options, hardware)
    tokenizer = _tokenizer(job, options)
    common = (fetch_model(job), *reference_steps(job), *tokenizer, *_export(job, options))
    runs_here = _runs_here(settings, hardware)
    wanted = not job.large if options.compile is None else options.compile
    compiles = wanted and runs_here and hardware.isa == machines.probe().isa
    last = "ir" if compiles else "engine"
    unquantized, made = _made(job, options, settings, last, bool(tokenizer))
    compiled: tuple[Step, ...] = ()
    if compiles:
        told = openvino_compile.CompileOptions(settings=settings)
        compiled = (Step("engine", openvino_compile.STAGE, told, {"ir": "ir"}),)
    judged: tuple[Step, ...] = ()
    plain = {"device": "CPU", "threads": settings.threads, **PLAIN}
    compared = compares_unquantized(job, options)
    if unquantized and (compared or any("unquantized" in step.needs.values() for step in made)):
        judged = unquantized
    if unquantized and compared:
        judged += (parity_step(PARITY, OPENER, plain, engine="unquantized"),)
    executed = {key: getattr(settings, key) for key in PLAIN}
    ends: tuple[Step, ...] = ()
    if executed != dict(PLAIN):
        ends += (replace(parity_step(PARITY, OPENER, plain, precision=options.precision), name="parity.f32"),)
    if runs_here:
        ends += (parity_step(PARITY, OPENER, {}, precision=options.precision),)
    return (*common, *judged, *made, *compiled, *ends, golden_step(job))


def _made(
    job: Job, options: Options, settings: Settings, last: str, tokenizer: bool
) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """The fp32 IR that the rest is made from or held against, and the step `last`, which writes the IR."""
    direct = _direct(job, options)
    files = {"model": "model", **({"tokenizer": "tokenizer"} if tokenizer else {})}
    source = files if direct else {**files, "export": "export"}
    plain = Settings(threads=options.threads, device=settings.device)

    def written(name: str, precision: Any, told: Settings, compression: Any = None) -> Step:
        if direct:
            chosen = openvino_weights.DecoderOptions(precision=precision, settings=told, compression=compression)
            return Step(name, openvino_weights.STAGE, chosen, source)
        return Step(
            name, openvino_convert.STAGE, openvino_convert.ConvertOptions(precision=precision, settings=told), source
        )

    precision = options.precision
    if precision == "fp32":
        return (), (written(last, "fp32", settings),)
    unquantized = (written("unquantized", "fp32", plain),)
    if precision in ("fp16", "bf16"):
        if precision == "bf16" and not direct and settings.execution != "bf16":
            raise UnavailableError(
                "bf16 of this model is an execution precision, and the CPU that it is for computes in fp32",
                hint="use precision fp32 or fp16, or name a `hardware` with bf16",
            )
        return unquantized, (written(last, precision, settings),)
    scheme = options.scheme
    if scheme == "auto":
        scheme = "activations" if precision == "int8" and job.kind == "encoder" else "weights"
    needs = {**files, "ir": "unquantized"}
    if scheme == "activations":
        return unquantized, _ptq(job, options, settings, last, needs)
    if direct and not options.quantize.data_aware:
        return unquantized, (written(last, precision, settings, options.quantize),)
    if options.quantize.data_aware and precision != "int4":
        raise RecipeError("quantize: awq, scale_estimation, gptq and ratio are for int4", hint="leave them out")
    told = openvino_compress.CompressOptions(
        precision=cast(Any, precision), compression=options.quantize, settings=settings
    )
    if not options.quantize.data_aware:
        return unquantized, (Step(last, openvino_compress.STAGE, told, needs),)
    fetched, data = _data(job, "quantize")
    told = replace(told, samples=data.samples, length=data.length)
    return unquantized, (*fetched, Step(last, openvino_compress.STAGE, told, {**needs, "calibration": "calibration"}))


def _ptq(job: Job, options: Options, settings: Settings, last: str, needs: Mapping[str, str]) -> tuple[Step, ...]:
    if options.precision != "int8" or job.kind != "encoder":
        raise RecipeError("scheme: activations is for encoders in int8", hint="leave `scheme` out, or say `weights`")
    if job.task in NO_TEXT:
        raise RecipeError(
            "scheme: activations measures ranges on text, and this model reads images", hint="use `scheme: weights`"
        )
    fetched, data = _data(job, "ptq")
    told = openvino_ptq.PtqOptions(**vars(options.ptq), settings=settings, samples=data.samples, length=data.length)
    return (*fetched, Step(last, openvino_ptq.STAGE, told, {**needs, "calibration": "calibration"}))


def _data(job: Job, what: str) -> tuple[tuple[Step, ...], Data]:
    """The step that fetches the calibration data, and how much of them is used."""
    if job.recipe.calibration is None:
        raise RecipeError(
            f"`{what}` as it is asked for measures the model on calibration data, and the recipe names none",
            hint="add a `calibration:` section with `path:`"
            + (
                ", or use `scheme: weights`"
                if what == "ptq"
                else ", or leave awq, scale_estimation, gptq and ratio out"
            ),
        )
    return fetch_data(job, "calibration"), job.recipe.calibration


def _settings(job: Job, options: Options, hardware: Hardware) -> Settings:
    """How the engine runs, decided for the hardware that it is for, so that plan, manifest and engine say it."""
    precision, execution, kv_cache = options.precision, options.execution, options.kv_cache
    wanted = {"fp32": "f32", "fp16": "f16"}.get(precision, "bf16")
    gpu = options.device != "cpu"
    if execution == "auto":
        fits = computes_in(hardware.isa, wanted)
        execution = "f32" if wanted == "f32" or not (fits or gpu) else cast(Execution, "f16" if gpu else wanted)
    elif not gpu and not computes_in(hardware.isa, execution):
        raise UnavailableError(
            f"execution: {execution} needs a CPU that computes in it, and {hardware.name} has none of its features",
            hint="leave `execution` out: OpenVINO would run f32 there without a word",
        )
    if kv_cache == "auto":
        kv_cache = cast(KvCache, {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}.get(precision, "u8"))
    if job.kind != "decoder":
        kv_cache = "f32"
    dynamic = options.dynamic_quantization
    if dynamic == "auto":
        dynamic = 32 if precision in ("int8", "int4") and job.kind == "decoder" else 0
    return Settings(
        device=cast(Any, DEVICES[options.device]),
        execution=execution,
        kv_cache=kv_cache,
        dynamic_quantization=dynamic,
        threads=options.threads,
    )


def _runs_here(settings: Settings, hardware: Hardware) -> bool:
    """Whether this machine is one that the engine is for: then it is compiled and judged here."""
    host = machines.probe()
    if settings.device != "CPU":
        return False  # what Intel's accelerators need is not probed: their engines are proved by `verify --run` there
    same = hardware.name == "host" or (hardware.os, hardware.arch) == (host.os, host.arch)
    return same and set(hardware.isa) <= set(host.isa) and computes_in(host.isa, settings.execution)


def _direct(job: Job, options: Options) -> bool:
    """Whether our builder writes the model; decided here, from config.json, so that the plan shows it."""
    if options.exporter == "torch":
        return False
    if job.kind != "decoder":
        if options.exporter == "direct":
            raise RecipeError("exporter: direct builds decoders only", hint="leave `exporter` out, or say `torch`")
        return False
    try:
        read_decoder(job.config)
    except UnavailableError:
        if options.exporter == "direct":
            raise
        return False
    return True


def _export(job: Job, options: Options) -> tuple[Step, ...]:
    """The ONNX graph that other targets have too, where our builder does not read the checkpoint itself."""
    if _direct(job, options):
        return ()
    told = onnx_torch.TorchExportOptions(
        task=cast(Task, job.task), trust_remote_code=job.recipe.model.trust_remote_code
    )
    return (Step("export", onnx_torch.STAGE, told, {"model": "model"}),)


def _tokenizer(job: Job, options: Options) -> tuple[Step, ...]:
    if job.kind != "decoder" or not options.tokenizer:
        return ()
    told = openvino_tokenizer.TokenizerOptions(trust_remote_code=job.recipe.model.trust_remote_code)
    return (Step("tokenizer", openvino_tokenizer.STAGE, told, {"model": "model"}),)


def facts(engine: Mapping[str, Any], options: Options, hardware: Hardware) -> Facts:
    """Served by OpenVINO, or as a folder of OpenVINO GenAI. The blob asks for one exact version, but the IR beside it
    does not."""
    decoder = engine["kind"] == "decoder"
    compiled = engine.get("compiled")
    return Facts(
        requires={"openvino": "2026.0", **({"openvino-genai": "2026.0"} if decoder else {})},
        layout="openvino-genai" if decoder else "openvino",
        entry="." if decoder else engine["components"]["model"],
        command=("enginewright", "generate", "."),
        device=options.device,
        isa=tuple(compiled["isa"]) if compiled else (),
    )


def open(engine: Path, hardware: Hardware) -> Engine:
    """An Engine over OpenVINO for an engine's folder or an artifact."""
    from pipeline.targets.ov_engine import open_engine

    return open_engine(engine)


def can_run(manifest: Mapping[str, Any], hardware: Hardware) -> Verdict:
    """Any CPU that OpenVINO is built for, if it computes in the engine's execution precision; GPU and NPU by driver."""
    settings = manifest["runtime"].get("settings") or {}
    execution = settings.get("execution", "f32")
    if settings.get("device", "CPU") != "CPU":
        return Verdict(True, f"OpenVINO runs it where it finds a {settings['device']}")
    if not computes_in(hardware.isa, execution):
        return Verdict(False, f"it executes in {execution}, which this CPU does not compute in")
    return Verdict(True, "OpenVINO runs it on the CPU")
