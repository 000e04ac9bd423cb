"""The pipeline that the targets tensorrt and tensorrt-rtx share, and what they refuse before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from pipeline import hardware as machines
from pipeline.errors import RecipeError, UnavailableError
from pipeline.frozen import frozen
from pipeline.hardware import Hardware
from pipeline.recipe import TargetOptions, Task, option
from pipeline.size import holding
from pipeline.stages import measure
from pipeline.stages.onnx import torch as onnx_torch
from pipeline.stages.onnx.families import read_decoder
from pipeline.stages.tensorrt import decoder as trt_decoder
from pipeline.stages.tensorrt import engine as trt_engine
from pipeline.stages.tensorrt import graph as trt_graph
from pipeline.stages.tensorrt import preflight as trt_preflight
from pipeline.stages.tensorrt.build import Build
from pipeline.stages.tensorrt.decoder_graph import check as check_decoder
from pipeline.stages.tensorrt.flavours import Flavour, check_capabilities, check_options
from pipeline.step import Inputs, Progress, Stage, Step
from pipeline.targets import Job
from pipeline.targets.common import fetch_data, fetch_model, golden_step, parity_step, reference_steps

JUDGE = "pipeline.targets.trt_judge:open_engine"
RUNNER = "pipeline.targets.trt_runner:open_engine"
OPSET = 23
_CACHE = 4096
"""Longest cache where the recipe says nothing: a long context costs memory whether it is used or not."""


@frozen(kw_only=True)
class TensorRtOptions(TargetOptions):
    """What both flavours can be asked for. Fixed by the recipe, since a plan serves only the shapes of its profile."""

    precision: trt_graph.Precision = option(
        "fp16", "Type of weights and activations. int8 and fp8 calibrate on the recipe's data; int4 is weights."
    )
    devices: tuple[str, ...] = option(
        tuple,
        "Machines that the engine is for, by hardware profile, beside `hardware`.",
        example="[rtx-3090, rtx-4090, rtx-5090]",
    )
    engines: Literal["one", "each"] = option(
        "one", "One plan for all compute capabilities, or a plan for each (Triton picks by `cc_model_filenames`)."
    )
    batch: tuple[int, int, int] = option((1, 8, 32), "Smallest, usual and largest batch.", unit="rows", ge=1)
    sequence: tuple[int, int, int] = option(
        (1, 128, 512),
        "Encoders: smallest, usual and largest length of an input, cut to the model's positions. Decoders: of the "
        "piece of a prompt that is read at once.",
        unit="tokens",
        ge=1,
    )
    cache_length: int = option(
        0, "Decoders: length of the KV cache; 0 is the model's context, at most 4096.", unit="tokens", ge=0
    )
    quantize: trt_graph.Typing = option(trt_graph.Typing, "int8, fp8, int4: how.")
    build: Build = option(Build, "How the engine is compiled.")


def measure_graph(inputs: Inputs, options: measure.MeasureOptions, out: Any, progress: Progress) -> None:
    """The parity stage, of the graph that stands for an engine, keyed by the runtime that answers."""
    measure.run(inputs, options, out, progress)


GRAPH_PARITY = Stage(
    "tensorrt.parity.graph",
    measure_graph,
    tools=("onnxruntime", "onnx"),
    scope="isa",
    memory=holding(420, weights=1.3, logits=3),
)
PARITY_RTX = Stage(
    "tensorrt-rtx.parity",
    measure_graph,
    tools=("tensorrt_rtx_cu13_libs", "torch"),
    scope="device",
    memory=holding(420, weights=1.3, logits=3),
)
PARITY = Stage(
    "tensorrt.parity",
    measure_graph,
    tools=("tensorrt", "torch"),
    scope="device",
    memory=holding(420, weights=1.3, logits=3),
)


def steps(job: Job, name: str, options: TensorRtOptions, hardware: Hardware, flavour: Flavour) -> tuple[Step, ...]:
    """fetch, export, preflight, reference, graph and its parity, engine, golden; parity where a GPU can run it.

    The parser judges the graph before the reference and calibration cost anything.
    """
    capabilities = _check(job, name, options, hardware, flavour)
    rtx = flavour.builds_on_cpu
    asked = trt_preflight.PreflightOptions(flavour=flavour.name)
    stage = trt_preflight.STAGE_RTX if rtx else trt_preflight.STAGE
    roles = {"export": "export", "model": "model", "preflight": "preflight"}
    calibration = job.recipe.calibration
    common = (
        fetch_model(job),
        _export(job, options),
        Step("preflight", stage, asked, {"export": "export", "model": "model"}),
        *reference_steps(job),
    )
    graph = trt_graph.GraphOptions(precision=options.precision, **_chosen(options))
    plain: tuple[Step, ...] = ()
    if options.precision in trt_graph.QUANTIZED:
        before = trt_graph.GraphOptions(precision="fp32")
        plain = (
            Step("unquantized", trt_graph.STAGE, before, roles),
            parity_step(GRAPH_PARITY, JUDGE, {}, engine="unquantized"),
        )
    data: tuple[Step, ...] = ()
    if options.precision in trt_graph.CALIBRATED:
        assert calibration is not None  # _check
        graph = trt_graph.GraphOptions(**{**vars(graph), "samples": calibration.samples, "length": calibration.length})
        data, roles = fetch_data(job, "calibration"), {**roles, "calibration": "calibration"}
    engine = trt_engine.EngineOptions(
        flavour=flavour.name,
        capabilities=capabilities,
        together=options.engines == "one",
        batch=options.batch,
        sequence=_sequence(job, options),
        build=options.build,
        sparse=options.prune is not None,
        timing_cache=str(job.sources.cache / "timing") if job.sources.cache and not rtx else None,
    )
    made = (
        *data,
        Step("graph", trt_graph.STAGE, graph, roles),
        parity_step(GRAPH_PARITY, JUDGE, {}, engine="graph"),
        Step("engine", trt_engine.STAGE_RTX if rtx else trt_engine.STAGE, engine, {"graph": "graph"}),
        golden_step(job),
    )
    proof: tuple[Step, ...] = ()
    if any(device.compute_capability in capabilities for device in machines.probe().devices):
        proof = (parity_step(PARITY_RTX if rtx else PARITY, RUNNER, {}),)
    return (*common, *plain, *made, *proof)


def capabilities_of(options: TensorRtOptions, hardware: Hardware) -> tuple[str, ...]:
    """The compute capabilities of `hardware` and `devices`, sorted, each once. RecipeError when there are none."""
    machines_ = [machines.load(name) for name in options.devices]
    if hardware.devices or not machines_:
        machines_.insert(0, hardware)
    found: dict[str, None] = {}
    for machine in machines_:
        capability = next((d.compute_capability for d in machine.devices if d.compute_capability), "")
        if not capability:
            raise RecipeError(
                f"{'this host' if machine.name == 'host' else machine.name} has no GPU to build for",
                hint="name one by its profile: `hardware: rtx-4090`, or several by `devices: [...]`",
            )
        found[capability] = None
    return tuple(sorted(found, key=lambda each: tuple(map(int, each.split(".")))))


def _check(job: Job, name: str, options: TensorRtOptions, hardware: Hardware, flavour: Flavour) -> tuple[str, ...]:
    """Refuse what can be known before anything runs; the compute capabilities otherwise."""
    capabilities = capabilities_of(options, hardware)
    together = options.engines == "one"
    check_capabilities(flavour, capabilities, options.precision, together and flavour.builds_on_cpu)
    build = options.build
    check_options(
        flavour,
        {
            "hardware_compatibility": bool(build.hardware_compatibility),
            "version_compatible": build.version_compatible,
            "strip_weights": build.strip_weights,
        },
    )
    for field in ("batch", "sequence"):
        low, usual, high = getattr(options, field)
        if not low <= usual <= high:
            raise RecipeError(
                f"targets.{name}.{field} is [{low}, {usual}, {high}]: smallest, usual and largest must not fall",
                hint="give three numbers in rising order",
            )
    if job.kind == "seq2seq":
        raise UnavailableError(
            f"{flavour.title} targets build encoders and decoders, and {job.task} needs both at once",
            hint="use `runtime: onnxruntime`",
        )
    if job.kind == "decoder":
        if options.precision in trt_graph.CALIBRATED:
            raise RecipeError(
                f"precision {options.precision} is for encoders: a decoder's activations are not calibrated here",
                hint="use int4 (weights) or fp16",
            )
        try:
            check_decoder(read_decoder(job.config))
        except UnavailableError as error:
            message = error.message.replace("the fused exporter", "the static decoder's exporter")
            hint = "use `runtime: onnxruntime`" if "fused" in error.message else error.hint
            raise UnavailableError(message, hint=hint) from error
    if options.precision in trt_graph.CALIBRATED and job.task == "image-classification":
        raise RecipeError(
            f"precision {options.precision} calibrates on text, and this model takes images", hint="use fp16"
        )
    if options.precision in trt_graph.CALIBRATED and job.recipe.calibration is None:
        raise RecipeError(
            f"precision {options.precision} measures the range of activations on calibration data, and the recipe "
            "names none",
            hint="add a `calibration:` section with `path:`, or use fp16",
        )
    if not flavour.builds_on_cpu:
        _check_host(capabilities, flavour)
    return capabilities


def _check_host(capabilities: Sequence[str], flavour: Flavour) -> None:
    here = {device.compute_capability for device in machines.probe().devices}
    for capability in capabilities:
        if capability not in here:
            have = f"this host's GPU has {', '.join(sorted(here))}" if here else "this host has no GPU"
            raise UnavailableError(
                f"{flavour.title} builds on a GPU of the kind that the engine is for: compute capability {capability} "
                f"is asked for, and {have}",
                hint="build on such a machine; `runtime: tensorrt-rtx` builds here for RTX GPUs",
            )


def _chosen(options: TensorRtOptions) -> dict[str, Any]:
    """What of `quantize` counts for the precision: the rest stays out of the key."""
    chosen = vars(options.quantize)
    names = {
        "int4": ("group_size", "search", "head", "rest", "exclude"),
        "int8": ("calibration", "percentile", "rest", "exclude"),
        "fp8": ("calibration", "percentile", "rest", "exclude"),
    }.get(options.precision, ())
    return {name: chosen[name] for name in names}


def _positions(job: Job) -> int | None:
    value = job.config.get("max_position_embeddings")
    return value if isinstance(value, int) and value > 0 else None


def _sequence(job: Job, options: TensorRtOptions) -> tuple[int, int, int]:
    most = options.sequence[2]
    if job.kind == "decoder":
        most = min(most, _cache_length(job, options))
    elif (positions := _positions(job)) is not None:
        # Roberta counts its positions from behind the padding token.
        offset = int(job.config.get("pad_token_id") or 0) + 1 if "roberta" in str(job.config.get("model_type")) else 0
        most = min(most, positions - offset)
    low, usual, _ = options.sequence
    if low > most:
        raise RecipeError(f"sequence begins at {low}, and the model has {most} positions", hint="begin lower")
    return low, min(usual, most), most


def _cache_length(job: Job, options: TensorRtOptions) -> int:
    context = read_decoder(job.config).context
    if options.cache_length > context:
        raise RecipeError(
            f"cache_length is {options.cache_length}, and the model's context ends at {context}",
            hint=f"ask for at most {context}",
        )
    return options.cache_length or min(context, _CACHE)


def _export(job: Job, options: TensorRtOptions) -> Step:
    if job.kind == "decoder":
        static = trt_decoder.StaticOptions(cache_length=_cache_length(job, options))
        return Step("export", trt_decoder.STAGE, static, {"model": "model"})
    told = onnx_torch.TorchExportOptions(
        task=cast(Task, job.task), trust_remote_code=job.recipe.model.trust_remote_code, opset=OPSET
    )
    return Step("export", onnx_torch.STAGE, told, {"model": "model"})
