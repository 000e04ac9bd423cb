"""Target `vllm`: a Hugging Face folder with serve arguments that were checked against the model and the machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.engine import Engine
from pipeline.errors import RecipeError, UnavailableError
from pipeline.frozen import frozen
from pipeline.hardware import Hardware, Verdict, no_cuda, probe
from pipeline.places import toolchain_python
from pipeline.recipe import option
from pipeline.size import holding
from pipeline.stages import measure
from pipeline.stages.llm import folder as llm_folder
from pipeline.stages.llm.family import table
from pipeline.stages.llm.scheme import TORCH_NAMES
from pipeline.step import Inputs, Progress, Stage, Step
from pipeline.targets import Facts, Job
from pipeline.targets.common import golden_step, parity_step
from pipeline.targets.llm_plan import (
    LlmOptions,
    Planned,
    check_cpu,
    check_parallel,
    checkpoint_steps,
    context_of,
    folder_step,
    judged_checkpoint,
    lacks,
    understand,
)

EXTRA = "torch"
OPENER = "pipeline.targets.vllm_engine:open_engine"
TOOLCHAIN = "vllm-cpu"
_SHARE = {"cuda": 0.9, "cpu": 0.4}
"""Of the memory. What vLLM itself would take of a CPU's, 0.92 of all, is more than what is free on most machines."""


@frozen(kw_only=True)
class Serve:
    """Arguments of `vllm serve`. Each is checked before anything runs, and written out."""

    max_model_len: int | None = option(None, "Longest context. Not given: the model's.", unit="tokens", ge=1)
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e5m2"] = option("auto", "Type of the KV cache.")
    tp: int = option(1, "Tensor parallel size.", ge=1)
    pp: int = option(1, "Pipeline parallel size.", ge=1)
    dp: int = option(1, "Data parallel size.", ge=1)
    expert_parallel: bool = option(False, "Mixture of experts: whole experts on each rank.")
    nodes: int = option(1, "Machines that one replica spreads over.", ge=1)
    executor: Literal["auto", "mp", "ray"] = option(
        "auto", "Who starts the ranks. `auto`: vLLM's own choice on one node, mp (no Ray cluster needed) on several."
    )
    gpu_memory_utilization: float | None = option(
        None,
        "Share of the device's memory that vLLM may take: of a GPU's, or of all of the machine's. Not given: 0.9 of a "
        "GPU's, 0.4 of a machine's.",
        ge=0.05,
        le=1.0,
    )
    max_num_seqs: int | None = option(None, "Requests that run side by side. Not given: vLLM's own choice.", ge=1)
    prefix_caching: bool = option(True, "Keep the KV cache of prompts that begin alike.")
    host: str = option("127.0.0.1", "Address that the server listens on.")
    port: int = option(8000, "Port that the server listens on.", ge=1, le=65535)


@frozen(kw_only=True)
class Options(LlmOptions):
    """What a vLLM target can be asked for."""

    device: Literal["cpu", "cuda"] = option("cuda", "What vLLM is built for.")
    serve: Serve = option(Serve, "How it is served.")


def assemble(inputs: Inputs, options: llm_folder.FolderOptions, out: Path, progress: Progress) -> None:
    """The folder that is packaged."""
    llm_folder.run(inputs, options, out, progress)


def measure_engine(inputs: Inputs, options: measure.MeasureOptions, out: Path, progress: Progress) -> None:
    """The parity stage, through vLLM itself."""
    measure.run(inputs, options, out, progress)


STAGE = Stage("vllm.engine", assemble, version=2, tools=("numpy",), memory=holding(190))
PARITY = Stage(
    "vllm.parity",
    measure_engine,
    tools=("vllm-cpu", "torch"),
    scope="isa",
    toolchain=TOOLCHAIN,
    deterministic=False,
    memory=holding(520, weights=1.7, logits=3),
)


def why_not(kind: str, config: Mapping[str, Any], hardware: Hardware) -> str | None:
    """Proposed for decoders where there is a GPU."""
    return no_cuda(hardware) if kind == "decoder" else f"no decoder: {kind}"


def steps(job: Job, name: str, options: Options, hardware: Hardware) -> tuple[Step, ...]:
    """fetch, reference, [calibrate], quantize, parity.checkpoint, engine, [parity], golden.

    The server itself is judged where it can run: on a CPU with the toolchain vllm-cpu; else that is deferred.
    """
    planned = understand(job, "vllm", options, hardware)
    check_serve(options, planned, hardware)
    context = context_of(planned.family, options.serve.max_model_len, "serve.max_model_len")
    settings = {"dtype": TORCH_NAMES[planned.scheme.dtype], "device": options.device, "max_model_len": context}
    settings["kv_cache_dtype"] = options.serve.kv_cache_dtype
    engine = folder_step(job, planned, STAGE, settings=settings, serve=command(options, planned), context=context)
    measured: tuple[Step, ...] = ()
    able = options.device == "cpu" and not lacks("vllm", planned.scheme, probe())
    if able and toolchain_python(TOOLCHAIN, job.recipe.toolchains)[0].is_file():
        measured = (parity_step(PARITY, OPENER, settings),)
    return (*checkpoint_steps(job, planned), judged_checkpoint("vllm"), engine, *measured, golden_step(job))


def check_serve(options: Options, planned: Planned, hardware: Hardware) -> None:
    """Refuse serve arguments that the model or the device does not allow. Raises RecipeError naming the field."""
    serve, facts = options.serve, table()["engines"]["vllm"]
    if options.device == "cpu":
        check_cpu("vllm", planned.scheme, planned.family, hardware)
        if serve.kv_cache_dtype not in facts["cpu_kv"]:
            raise RecipeError(f"serve.kv_cache_dtype: vLLM on a CPU knows {', '.join(facts['cpu_kv'])}")
    check_parallel(planned.family, planned.scheme, tp=serve.tp, pp=serve.pp)
    if serve.expert_parallel and not planned.family.experts:
        raise RecipeError("serve.expert_parallel: the model has no experts", hint="leave it out")
    if serve.nodes > 1 and (serve.tp * serve.pp) % serve.nodes:
        raise RecipeError(
            f"serve.nodes: {serve.tp} x {serve.pp} ranks (tp x pp) do not spread evenly over {serve.nodes} nodes"
        )


def command(options: Options, planned: Planned) -> tuple[str, ...]:
    """`vllm serve` with every argument that was decided. Node ranks and the master's address are the launcher's."""
    serve = options.serve
    words: list[Any] = ["vllm", "serve", "{artifact}", "--dtype", TORCH_NAMES[planned.scheme.dtype]]
    words += ["--max-model-len", context_of(planned.family, serve.max_model_len, "serve.max_model_len")]
    words += ["--kv-cache-dtype", serve.kv_cache_dtype, "--tensor-parallel-size", serve.tp]
    words += ["--pipeline-parallel-size", serve.pp, "--data-parallel-size", serve.dp]
    words += ["--gpu-memory-utilization", serve.gpu_memory_utilization or _SHARE[options.device]]
    words += ["--max-num-seqs", serve.max_num_seqs] if serve.max_num_seqs else []
    words += ["--enable-prefix-caching" if serve.prefix_caching else "--no-enable-prefix-caching"]
    words += ["--enable-expert-parallel"] if serve.expert_parallel else []
    executor = "mp" if serve.executor == "auto" and serve.nodes > 1 else serve.executor
    words += ["--distributed-executor-backend", executor] if executor != "auto" else []
    words += ["--nnodes", serve.nodes] if serve.nodes > 1 and executor == "mp" else []
    words += ["--host", serve.host, "--port", serve.port]
    return tuple(map(str, words))


def facts(engine: Mapping[str, Any], options: Options, hardware: Hardware) -> Facts:
    """A Hugging Face folder, and the command that serves it."""
    package = "vllm-cpu" if options.device == "cpu" else "vllm"
    serve = tuple(engine["serve"])
    return Facts({package: "0.32"}, layout="huggingface", entry=".", command=serve, device=options.device, isa=())


def open(engine: Path, hardware: Hardware) -> Engine:
    """An Engine over vLLM, in this process or in the toolchain's."""
    from pipeline.targets.llm_torch import read_settings
    from pipeline.targets.vllm_engine import open_anywhere

    return open_anywhere(engine, read_settings(engine))


def can_run(manifest: Mapping[str, Any], hardware: Hardware) -> Verdict:
    """Where vLLM is installed for the device that the artifact names."""
    device = manifest["target"]["device"]["kind"]
    if device == "cuda":
        reason = no_cuda(hardware)
        return Verdict(not reason, reason or "vLLM runs it on CUDA")
    try:
        from pipeline.targets.vllm_engine import where

        where()
    except UnavailableError as error:
        return Verdict(False, error.message)
    return Verdict(True, "vLLM runs it on the CPU")
