"""Target `transformers`: a folder that `AutoModelForCausalLM.from_pretrained` and `pipeline()` load, on CPU or CUDA.

The Hugging Face baseline: plain weights, or compressed-tensors and FP8 that transformers reads itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.engine import Engine
from pipeline.frozen import frozen
from pipeline.hardware import Hardware, Verdict, no_cuda, probe
from pipeline.recipe import option
from pipeline.size import holding
from pipeline.stages import measure
from pipeline.stages.llm import folder as llm_folder
from pipeline.stages.llm.scheme import TORCH_NAMES
from pipeline.step import Inputs, Progress, Stage, Step
from pipeline.targets import Facts, Job
from pipeline.targets.common import golden_step, parity_step
from pipeline.targets.llm_plan import LlmOptions, checkpoint_steps, context_of, folder_step, understand

EXTRA = "transformers"
OPENER = "pipeline.targets.llm_torch:open_transformers"


@frozen(kw_only=True)
class Options(LlmOptions):
    """What a transformers target can be asked for."""

    device: Literal["cpu", "cuda"] = option("cpu", "Where torch runs.")
    compile: bool = option(False, "Run the model through torch.compile: slow to start, faster after that.")
    compute: Literal["auto", "fp32", "fp16", "bf16"] = option(
        "fp32", "The type in which torch computes. `auto`: what the folder says. fp32 is exact, and fast on CPUs."
    )


def assemble(inputs: Inputs, options: llm_folder.FolderOptions, out: Path, progress: Progress) -> None:
    """The folder that is packaged."""
    llm_folder.run(inputs, options, out, progress)


def measure_engine(inputs: Inputs, options: measure.MeasureOptions, out: Path, progress: Progress) -> None:
    """The parity stage, through transformers' own reader."""
    measure.run(inputs, options, out, progress)


STAGE = Stage("transformers.engine", assemble, tools=("numpy",), memory=holding(190))
TOOLS = ("torch", "transformers", "compressed-tensors", "accelerate", "numpy")
PARITY = Stage(
    "transformers.parity", measure_engine, tools=TOOLS, scope="isa", memory=holding(520, weights=1.7, logits=3)
)
PARITY_CUDA = Stage(
    "transformers.parity", measure_engine, tools=TOOLS, scope="device", memory=holding(520, weights=1.7, logits=3)
)


def why_not(kind: str, config: Mapping[str, Any], hardware: Hardware) -> str | None:
    """Proposed for decoders where there is a GPU."""
    return no_cuda(hardware) if kind == "decoder" else f"no decoder: {kind}"


def steps(job: Job, name: str, options: Options, hardware: Hardware) -> tuple[Step, ...]:
    """fetch, reference, [calibrate], quantize, engine, parity, golden. On CUDA, parity is deferred without a device."""
    planned = understand(job, "transformers", options, hardware)
    dtype = "" if options.compute == "auto" else TORCH_NAMES[options.compute]
    settings = {"dtype": dtype, "device": options.device, "compile": options.compile}
    context = context_of(planned.family, None, "context")
    engine = folder_step(job, planned, STAGE, settings=settings, serve=(), context=context)
    measured: tuple[Step, ...] = ()
    if options.device == "cpu" or not no_cuda(probe()):
        stage = PARITY if options.device == "cpu" else PARITY_CUDA
        measured = (parity_step(stage, OPENER, settings),)
    return (*checkpoint_steps(job, planned), engine, *measured, golden_step(job))


def facts(engine: Mapping[str, Any], options: Options, hardware: Hardware) -> Facts:
    """A Hugging Face folder."""
    layout = (engine.get("quantization") or {}).get("layout", "plain")
    extra = {"plain": {}, "fp8-block": {"accelerate": "1.0"}}.get(layout, {"compressed-tensors": "0.15"})
    return Facts(
        requires={"torch": "2.4", "transformers": "5.0", **extra},
        layout="huggingface",
        entry=".",
        command=("enginewright", "generate", "{artifact}"),
        device=options.device,
        isa=(),
    )


def open(engine: Path, hardware: Hardware) -> Engine:
    """An Engine over transformers."""
    from pipeline.targets.llm_torch import open_transformers, read_settings

    return open_transformers(engine, read_settings(engine))


def can_run(manifest: Mapping[str, Any], hardware: Hardware) -> Verdict:
    """Wherever torch runs; an artifact for CUDA needs such a device."""
    device = manifest["target"]["device"]["kind"]
    if device == "cuda" and (reason := no_cuda(hardware)):
        return Verdict(False, reason)
    return Verdict(True, f"transformers runs it on the {device}")
