"""What the three targets for LLM folders share: options, the scheme that they mean, the checks of a plan, the steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from pipeline.errors import RecipeError, UnavailableError
from pipeline.frozen import frozen
from pipeline.hardware import Hardware
from pipeline.recipe import TargetOptions, option
from pipeline.size import holding
from pipeline.stages import measure
from pipeline.stages.llm import folder as llm_folder
from pipeline.stages.llm import observe as llm_observe
from pipeline.stages.llm import quantize as llm_quantize
from pipeline.stages.llm.family import Family, read_family, table
from pipeline.stages.llm.scheme import Layout, Quantize, Scheme, check
from pipeline.stages.llm.shards import stored_dtype
from pipeline.step import Inputs, Progress, Stage, Step
from pipeline.targets import Job
from pipeline.targets.common import fetch_data, fetch_model, reference_steps

DEQUANTIZED = "pipeline.targets.llm_torch:open_dequantized"


@frozen(kw_only=True)
class LlmOptions(TargetOptions):
    """What every target that serves a Hugging Face folder can be asked for."""

    precision: Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8"] = option(
        "bf16",
        "fp32, fp16 and bf16 pass the weights through. int4 is W4A16, int8 is W8A8 with a scale for each token, fp8 is "
        "FP8 with a scale for each token, or in blocks.",
    )
    quantize: Quantize = option(Quantize, "int4, int8, fp8: how.")
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = option(
        "auto",
        "Quantized: type of all else, and of the scales. `auto`: the checkpoint's own; bf16 for fp32.",
    )


@frozen
class Planned:
    """A recipe's target, understood."""

    family: Family
    scheme: Scheme


def understand(job: Job, engine: str, options: LlmOptions, hardware: Hardware) -> Planned:
    """The scheme that the options mean, checked against the model, the engine and the machine.

    Raises RecipeError or UnavailableError with the reason, before anything runs.
    """
    if job.task != "text-generation":
        raise RecipeError(f"the runtime {engine} serves text generation, not {job.task}", hint="use onnxruntime")
    facts = table()["engines"][engine]
    config, no = job.config, facts["no"]
    model_type = config.get("model_type")
    if model_type in table()["families"] and model_type not in facts["families"]:
        raise RecipeError(f"{engine} does not serve {model_type}: {no[model_type]}", hint="use the runtime vllm")
    family = read_family(config)
    scheme = scheme_of(job, options)
    if scheme.layout not in facts["layouts"]:
        raise RecipeError(f"{engine} does not read layout {scheme.layout}: {no[scheme.layout]}", hint="choose another")
    check(scheme, family)
    if scheme.bits == 4 and scheme.symmetric not in facts.get("symmetric", [True, False]):
        raise RecipeError(f"{engine}: {no['asymmetric']}", hint="leave `symmetric` out")
    if scheme.bits and model_type in facts.get("not_quantized", ()):
        raise RecipeError(f"{engine}: {no['quantized_experts']}", hint="say `precision: bf16`, or use vllm")
    if scheme.dtype not in facts.get("dtypes", [scheme.dtype]):
        raise RecipeError(f"{engine} computes in {' or '.join(facts['dtypes'])}, not in {scheme.dtype}")
    _check_machine(engine, facts, scheme, family, hardware)
    return Planned(family, scheme)


def scheme_of(job: Job, options: LlmOptions) -> Scheme:
    """The scheme that `precision` and `quantize` name, every `auto` decided."""
    chosen, precision = options.quantize, options.precision
    if precision in ("fp32", "fp16", "bf16"):
        if chosen != Quantize():
            raise RecipeError(f"quantize: precision {precision} does not quantize", hint="leave `quantize` out")
        return Scheme(layout="plain", dtype=cast(Any, precision))
    source = stored_dtype(job.config) or "bf16"
    dtype = options.dtype if options.dtype != "auto" else "bf16" if source == "fp32" else source
    layout: Layout = "w8a8" if precision == "int8" else "fp8"
    if precision == "fp8" and chosen.block:
        layout = "fp8-block"
    if precision == "int4":
        layout = cast(Layout, {"auto": "w4a16", "compressed-tensors": "w4a16"}.get(chosen.format, chosen.format))
    elif chosen.format in ("awq", "gptq"):
        raise RecipeError(f"quantize.format: {chosen.format} holds 4-bit weights, not {precision}")
    method = chosen.method
    if method == "auto":
        method = "awq" if precision == "int4" and job.recipe.calibration and _calibrates(job.config) else "rtn"
    if precision != "int4":
        return Scheme(layout=layout, dtype=dtype, method=method)
    symmetric = layout != "awq" if chosen.symmetric is None else chosen.symmetric
    return Scheme(layout=layout, dtype=dtype, method=method, group_size=chosen.group_size, symmetric=symmetric)


def _calibrates(config: Mapping[str, Any]) -> bool:
    return read_family(config).calibrates


def _check_machine(engine: str, facts: Mapping[str, Any], scheme: Scheme, family: Family, hardware: Hardware) -> None:
    """A named machine must have what the layout needs. On this host, what is missing is deferred, not refused."""
    device = next((each for each in hardware.devices if each.kind == "cuda"), None)
    if device is not None and device.compute_capability:
        low, high = facts.get("capability", {}).get(scheme.layout, ("", ""))
        have = _version(device.compute_capability)
        if low and have < _version(low):
            raise RecipeError(
                f"{engine}: layout {scheme.layout} needs compute capability {low}, "
                f"and {device.name} has {device.compute_capability}",
                hint="choose another precision or machine",
            )
        if high and have >= _version(high):
            raise RecipeError(
                f"{engine}: no kernel of layout {scheme.layout} from compute capability {high} on, "
                f"and {device.name} has {device.compute_capability}",
                hint="say `precision: fp8`",
            )


def lacks(engine: str, scheme: Scheme, hardware: Hardware) -> str:
    """The instruction set that the engine's CPU kernel of a layout needs and a machine does not have; else empty."""
    needed: str = table()["engines"][engine].get("cpu_isa", {}).get(scheme.layout, "")
    return "" if not needed or hardware.arch != "x86_64" or needed in hardware.isa else needed


def check_cpu(engine: str, scheme: Scheme, family: Family, hardware: Hardware) -> None:
    """Refuse what the engine does not run on a CPU. On this host what the CPU lacks is deferred, not refused."""
    facts = table()["engines"][engine]
    if scheme.layout not in facts["cpu"]:
        raise RecipeError(f"{engine} on a CPU: {facts['no'][f'cpu_{scheme.layout}']}", hint="or say `device: cuda`")
    if hardware.name != "host" and (missing := lacks(engine, scheme, hardware)):
        raise RecipeError(f"{engine} on {hardware.name}, without {missing}: {facts['no']['cpu_isa']}")
    if scheme.dtype == "fp32" and (why := facts["no"].get(f"cpu_fp32_{scheme.layout}")):
        raise RecipeError(f"{engine} on a CPU: {why}", hint="say `dtype: bf16`")
    if family.head_dim not in facts.get("cpu_head_dims", [family.head_dim]):
        raise RecipeError(
            f"{engine} on a CPU has no attention for heads of {family.head_dim}",
            hint=f"it knows {', '.join(map(str, facts['cpu_head_dims']))}",
        )


def check_parallel(family: Family, scheme: Scheme, *, tp: int, pp: int = 1) -> None:
    """Whether the model can be cut into `tp` parts across and `pp` along. Raises RecipeError naming the number."""
    if family.heads % tp:
        raise RecipeError(f"tp: {tp} does not divide the model's {family.heads} attention heads")
    if family.kv_heads % tp and tp % family.kv_heads:
        raise RecipeError(f"tp: {tp} is neither a divisor nor a multiple of the model's {family.kv_heads} KV heads")
    if pp > family.layers:
        raise RecipeError(f"pp: {pp} is more than the model's {family.layers} layers")
    whole = scheme.group_size if scheme.bits == 4 else 128 if scheme.layout == "fp8-block" else 1
    for linear in family.linears:
        cut = linear.name.endswith((".o_proj", ".down_proj", ".w2"))  # cut along their inputs
        if cut and (linear.in_features % tp or linear.in_features // tp % whole):
            raise RecipeError(
                f"tp: {tp} cuts the {linear.in_features} inputs of {linear.name} into parts that are no whole "
                f"groups of {whole}",
                hint="choose a smaller tp or group_size",
            )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def checkpoint_steps(job: Job, planned: Planned) -> tuple[Step, ...]:
    """fetch, reference, [calibration, observed], quantized: shared by every target whose scheme is the same."""
    scheme, needs = planned.scheme, {"model": "model"}
    told = llm_quantize.QuantizeOptions(scheme=scheme)
    before: tuple[Step, ...] = ()
    if scheme.calibrated:
        data = job.recipe.calibration
        if data is None:
            raise RecipeError(
                f"quantize.method: {scheme.method} reads calibration data, and the recipe names none",
                hint="add a `calibration:` section with `path:`, or say `method: rtn`",
            )
        before = fetch_data(job, "calibration")
        if scheme.method == "gptq":
            needs["calibration"] = "calibration"
            told = llm_quantize.QuantizeOptions(scheme=scheme, samples=data.samples, length=data.length)
        else:
            observe = llm_observe.ObserveOptions(samples=data.samples, length=data.length)
            sources = {"model": "model", "calibration": "calibration"}
            before = (*before, Step("observed", llm_observe.STAGE, observe, sources))
            needs["observed"] = "observed"
    return (
        fetch_model(job),
        *reference_steps(job),
        *before,
        Step("quantized", llm_quantize.STAGE, told, needs),
    )


def folder_step(
    job: Job, planned: Planned, stage: Stage[Any], *, settings: Mapping[str, Any], serve: tuple[str, ...], context: int
) -> Step:
    """`engine`: the folder that is packaged, validated."""
    ends = job.config.get("eos_token_id")
    options = llm_folder.FolderOptions(
        runtime=stage.name.partition(".")[0],
        scheme=planned.scheme,
        context_length=context,
        eos_token_ids=tuple(ends) if isinstance(ends, list) else () if ends is None else (int(ends),),
        settings=dict(settings),
        serve=serve,
        checked=table()["engines"][stage.name.partition(".")[0]]["checked"],
    )
    return Step("engine", stage, options, {"model": "model", "quantized": "quantized"})


def measure_checkpoint(inputs: Inputs, options: measure.MeasureOptions, out: Any, progress: Progress) -> None:
    """The parity stage over the checkpoint dequantized in torch."""
    measure.run(inputs, options, out, progress)


CHECKPOINT = Stage(
    "llm.parity",
    measure_checkpoint,
    tools=("torch", "transformers", "numpy"),
    scope="isa",
    memory=holding(520, weights=1.7, logits=3),
)


def judged_checkpoint(rule: str) -> Step:
    """`parity.checkpoint`: the folder dequantized in torch, its activations rounded as `rule` says, against the
    reference. It says what the checkpoint is worth; whether the server runs it is the step `parity`."""
    options = measure.MeasureOptions(opener=DEQUANTIZED, settings={"activations": rule})
    return Step("parity.checkpoint", CHECKPOINT, options, {"engine": "quantized", "reference": "reference"})


def context_of(family: Family, asked: int | None, what: str) -> int:
    """The longest context, at most the model's."""
    if asked is not None and asked > family.context:
        raise RecipeError(f"{what} is {asked}, and the model's max_position_embeddings is {family.context}")
    return asked or family.context


def missing_package(name: str, toolchain: str) -> UnavailableError:
    """The error for an engine whose package is not installed."""
    return UnavailableError(
        f"{name} is not installed here", hint=f"`enginewright toolchain install {toolchain}`, or pip install {name}"
    )
