"""Target `turbomind`: a Hugging Face folder for LMDeploy's TurboMind engine, with a strict engine config.

LMDeploy has no converted form: TurboMind reads the folder. It needs CUDA, so what runs here is the proof of the
checkpoint; parity of the engine itself is deferred to a machine with a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.engine import Engine
from pipeline.errors import RecipeError
from pipeline.frozen import frozen
from pipeline.hardware import Hardware, Verdict, no_cuda
from pipeline.recipe import option
from pipeline.size import holding
from pipeline.stages.llm import folder as llm_folder
from pipeline.stages.llm.family import Family, table
from pipeline.stages.llm.scheme import TORCH_NAMES
from pipeline.step import Inputs, Progress, Stage, Step
from pipeline.targets import Facts, Job
from pipeline.targets.common import golden_step
from pipeline.targets.llm_plan import (
    LlmOptions,
    Planned,
    check_parallel,
    checkpoint_steps,
    context_of,
    folder_step,
    judged_checkpoint,
    understand,
)

EXTRA = "torch"
FORMATS = {"plain": "hf", "w4a16": "compressed-tensors", "awq": "awq", "gptq": "gptq", "fp8-block": "fp8"}
"""Layout -> LMDeploy's name for it."""


@frozen(kw_only=True)
class Serve:
    """LMDeploy's engine config. LMDeploy drops names that it does not know and takes most wrong values: not here."""

    tp: int = option(1, "Tensor parallel size.", ge=1)
    dp: int = option(1, "Data parallel size.", ge=1)
    session_len: int | None = option(None, "Longest context. Not given: the model's.", unit="tokens", ge=1)
    max_batch_size: int | None = option(None, "Requests that run side by side. Not given: by the GPU.", ge=1)
    cache_max_entry_count: float = option(
        0.8, "Share of the memory that is free after loading which the KV cache takes.", ge=0.01, le=0.99
    )
    cache_block_seq_len: Literal[32, 64, 128] = option(64, "Tokens of one block of the KV cache.", unit="tokens")
    prefix_caching: bool = option(False, "Keep the KV cache of prompts that begin alike.")
    kv_cache: Literal["auto", "int8", "int4"] = option("auto", "Type of the KV cache. `auto`: the model's.")
    max_prefill_token_num: int = option(8192, "Tokens of one prefill iteration.", unit="tokens", ge=1)
    communicator: Literal["nccl", "cuda-ipc"] = option("nccl", "How GPUs talk to each other.")
    nodes: int = option(1, "Machines that the engine spreads over.", ge=1)
    node_rank: int = option(0, "Which of them this one is.", ge=0)
    dist_init_addr: str = option(
        "", "Several nodes: `host:port` of the first one.", pattern=r"|[A-Za-z0-9._-]+:[0-9]{1,5}"
    )
    host: str = option("127.0.0.1", "Address that the server listens on.")
    port: int = option(23333, "Port that the server listens on.", ge=1, le=65535)


@frozen(kw_only=True)
class Options(LlmOptions):
    """What a TurboMind target can be asked for."""

    serve: Serve = option(Serve, "How it is served.")


def assemble(inputs: Inputs, options: llm_folder.FolderOptions, out: Path, progress: Progress) -> None:
    """The folder that is packaged."""
    llm_folder.run(inputs, options, out, progress)


STAGE = Stage("turbomind.engine", assemble, version=2, tools=("numpy",), memory=holding(190))


def why_not(kind: str, config: Mapping[str, Any], hardware: Hardware) -> str | None:
    """Proposed for decoders where there is a GPU."""
    return no_cuda(hardware) if kind == "decoder" else f"no decoder: {kind}"


def steps(job: Job, name: str, options: Options, hardware: Hardware) -> tuple[Step, ...]:
    """fetch, reference, [calibrate], quantize, parity.checkpoint, engine, golden."""
    planned = understand(job, "turbomind", options, hardware)
    check_serve(options.serve, planned)
    context = context_of(planned.family, options.serve.session_len, "serve.session_len")
    settings = engine_config(options.serve, planned, context)
    engine = folder_step(
        job, planned, STAGE, settings=settings, serve=command(options.serve, settings), context=context
    )
    # Its int4 kernels compute on 16-bit activations; FP8 rounds them as vLLM does.
    return (*checkpoint_steps(job, planned), judged_checkpoint("vllm"), engine, golden_step(job))


def check_serve(serve: Serve, planned: Planned) -> None:
    """Refuse an engine config that the model does not allow. Raises RecipeError naming the field."""
    family: Family = planned.family
    check_parallel(family, planned.scheme, tp=serve.tp)
    facts = table()["engines"]["turbomind"]
    if planned.scheme.layout == "fp8-block" and family.head_dim % facts["block_head_dim"]:
        raise RecipeError(
            f"precision fp8: TurboMind's loader fails on blocks of 128 with heads of {family.head_dim}",
            hint="say `precision: bf16` or `int4`; vllm serves this model in fp8",
        )
    if serve.kv_cache != "auto" and family.head_dim not in facts["kv_head_dims"]:
        raise RecipeError(
            f"serve.kv_cache: {serve.kv_cache} needs heads of {facts['kv_head_dims'][0]}, the model's have "
            f"{family.head_dim}",
            hint="leave it out",
        )
    if serve.nodes > 1:
        if not serve.dist_init_addr:
            raise RecipeError("serve.dist_init_addr: several nodes need the address of the first one")
        if (serve.tp * serve.dp) % serve.nodes:
            raise RecipeError(
                f"serve.nodes: {serve.tp} x {serve.dp} GPUs do not spread evenly over {serve.nodes} nodes"
            )
    if serve.node_rank >= serve.nodes:
        raise RecipeError(f"serve.node_rank: {serve.node_rank} of {serve.nodes} nodes; ranks count from 0")


def engine_config(serve: Serve, planned: Planned, context: int) -> dict[str, Any]:
    """The fields of TurbomindEngineConfig, every one that was decided."""
    found: dict[str, Any] = {
        "dtype": TORCH_NAMES[planned.scheme.dtype],
        "model_format": FORMATS[planned.scheme.layout],
        "tp": serve.tp,
        "dp": serve.dp,
        "session_len": context,
        "cache_max_entry_count": serve.cache_max_entry_count,
        "cache_block_seq_len": serve.cache_block_seq_len,
        "enable_prefix_caching": serve.prefix_caching,
        "quant_policy": {"auto": 0, "int8": 8, "int4": 4}[serve.kv_cache],
        "max_prefill_token_num": serve.max_prefill_token_num,
        "communicator": serve.communicator,
    }
    if serve.max_batch_size:
        found["max_batch_size"] = serve.max_batch_size
    if serve.nodes > 1:
        found |= {"nnodes": serve.nodes, "node_rank": serve.node_rank, "dist_init_addr": serve.dist_init_addr}
    return found


def command(serve: Serve, config: Mapping[str, Any]) -> tuple[str, ...]:
    """`lmdeploy serve api_server` with the same fields. `probe.py engine` says before that whether it is TurboMind."""
    words: list[str] = ["lmdeploy", "serve", "api_server", "{artifact}", "--backend", "turbomind"]
    for name, value in config.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [] if value is False else [flag, str(value)]
    return (*words, "--server-name", serve.host, "--server-port", str(serve.port))


def facts(engine: Mapping[str, Any], options: Options, hardware: Hardware) -> Facts:
    """A Hugging Face folder, and the command that serves it."""
    serve = tuple(engine["serve"])
    return Facts({"lmdeploy": "0.18"}, layout="huggingface", entry=".", command=serve, device="cuda", isa=())


def open(engine: Path, hardware: Hardware) -> Engine:
    """An Engine over TurboMind; refuses LMDeploy's fallback."""
    from pipeline.targets.llm_torch import read_settings
    from pipeline.targets.turbomind_engine import open_engine

    return open_engine(engine, read_settings(engine))


def can_run(manifest: Mapping[str, Any], hardware: Hardware) -> Verdict:
    """A CUDA device is needed."""
    reason = no_cuda(hardware)
    return Verdict(not reason, reason or "TurboMind runs it on CUDA")
