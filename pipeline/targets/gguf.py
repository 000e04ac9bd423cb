"""Target `gguf`: decoders for llama.cpp and Ollama, in llama.cpp's own types.

One pass turns the checkpoint into the file. The model is first held against the reference in F32 with a KV cache in
F32: there llama.cpp and torch agree to rounding, so a wrong RoPE or norm cannot pass as quantization loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.engine import Engine
from pipeline.errors import EnginewrightError, RecipeError, UnavailableError
from pipeline.frozen import frozen
from pipeline.hardware import Hardware, Verdict, probe
from pipeline.recipe import TargetOptions, option
from pipeline.size import holding
from pipeline.stages import measure
from pipeline.stages.gguf import build as gguf_build
from pipeline.stages.gguf import imatrix as gguf_imatrix
from pipeline.stages.gguf import native as gguf_native
from pipeline.stages.gguf.build import KV, BuildOptions, Label, Layout
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

EXTRA = "gguf"
OPENER = "pipeline.targets.gguf_engine:open_engine"


@frozen(kw_only=True)
class Options(TargetOptions):
    """What a GGUF target can be asked for."""

    precision: Label = option("Q4_K_M", "Type of the file, in llama.cpp's words.")
    imatrix: bool = option(False, "Measure an importance matrix on the recipe's calibration data and quantize by it.")
    context_length: int | None = option(None, "Longest context. Not given: what config.json says.", unit="tokens", ge=1)
    pre_tokenizer: str | None = option(
        None, "llama.cpp's name of the pre-tokenizer, where tokenizer.json has one that is not known.", example="qwen2"
    )
    allow_fallback: bool = option(
        False, "Accept a file that holds no tensor of its label's type, because no row divides by the type's block."
    )
    kv_cache: Literal["auto", "F32", "F16"] = option(
        "auto", "Type of the KV cache with which the engine is judged and run. `auto`: F32 for F32, else F16."
    )
    layout: Layout = option(
        "llama.cpp",
        "How the artifact is arranged: a folder for llama.cpp, one with a Modelfile for `ollama create`, or a store "
        "that Ollama serves as it is (`OLLAMA_MODELS`), whose manifest a registry can answer with as well.",
    )
    ollama_name: str | None = option(
        None,
        "Layout ollama: `[host/][namespace/]model[:tag]`. Not given: the recipe's name, with the precision as the tag.",
        example="library/pydoc:q4_k_m",
    )
    template: Literal["jinja", "go"] = option(
        "jinja",
        "Ollama's template. `jinja`: the one inside the file (Ollama 0.30 and later). `go`: a Go template as well, if "
        "the model's is one of the known set; refused otherwise.",
    )
    system: str = option("", "Ollama: the system message that stands in the Modelfile or the store.")
    stop: tuple[str, ...] = option((), "Ollama: texts that end a generation.", example='["<|end|>"]')
    parameters: dict[str, float] = option(
        dict,
        "Ollama: parameters, over the sampling that generation_config.json says.",
        example="{num_ctx: 8192, temperature: 0.7}",
    )
    gpu_layers: int = option(0, "How many layers llama.cpp puts on a GPU; -1 is all.", ge=-1)
    threads: int = option(0, "Threads of one engine; 0 is every core that the process may use.", ge=0)


def measure_engine(inputs: Inputs, options: measure.MeasureOptions, out: Path, progress: Progress) -> None:
    """The parity stage, keyed by the runtime that answers; with the comparison of the tokenizers."""
    import json

    from pipeline.parity.stored import write_json
    from pipeline.targets.gguf_engine import open_file
    from pipeline.targets.gguf_tokens import compare

    measure.run(inputs, options, out, progress)
    report = json.loads((out / "report.json").read_bytes())
    child = open_file(inputs["engine"], vocab_only=True)
    differences, count = compare(child, inputs["engine"] / "tokenizer.json")
    plain = [each for each in differences if not each.normalized]
    report["metrics"] |= {
        "tokens_differ": len(plain),
        "tokens_differ_normalized": len(differences) - len(plain),
        "tokens_compared": count,
    }
    if differences:
        first = (plain or differences)[0]
        value = len(plain)
        shown = {"text": first.text, "reference": first.expected[:24], "engine": first.found[:24], "part": first.kind}
        report["worst"]["tokens"] = {"value": value, **shown}
    write_json(out / "report.json", report)


PARITY = Stage(
    "gguf.parity",
    measure_engine,
    tools=("xllamacpp", "tokenizers"),
    scope="isa",
    memory=holding(150, weights=1.1, logits=3),
)
PARITY_GPU = Stage(
    "gguf.parity",
    measure_engine,
    tools=("xllamacpp", "tokenizers"),
    scope="device",
    memory=holding(150, weights=1.1, logits=3),
)
PARITY_OTHER = Stage(
    "gguf.parity",
    measure_engine,
    tools=("llama_cpp_python", "tokenizers"),
    scope="isa",
    memory=holding(150, weights=1.1, logits=3),
)
PARITY_OTHER_GPU = Stage(
    "gguf.parity",
    measure_engine,
    tools=("llama_cpp_python", "tokenizers"),
    scope="device",
    memory=holding(150, weights=1.1, logits=3),
)
PARITIES = {"xllamacpp": (PARITY, PARITY_GPU), "llama_cpp_python": (PARITY_OTHER, PARITY_OTHER_GPU)}
"""Distribution that brings llama.cpp -> the stage on the CPU, and the one with a GPU."""


def steps(job: Job, name: str, options: Options, hardware: Hardware) -> tuple[Step, ...]:
    """fetch, reference, the model in F32 and its parity, importance, engine, parity, golden.

    An engine with layers on a GPU is judged here only if this machine has one: elsewhere its parity is deferred.
    """
    told = _told(job, options)
    common = (fetch_model(job), *reference_steps(job))
    plain = Step(
        "unquantized",
        gguf_build.STAGE,
        BuildOptions(
            name=job.recipe.name,
            label="F32",
            kv="F32",
            context_length=options.context_length,
            pre_tokenizer=options.pre_tokenizer,
        ),
        {"model": "model"},
    )
    parity, parity_gpu = PARITIES[gguf_native.installed()]
    structure: tuple[Step, ...] = ()
    if compares_unquantized(job, options):
        structure = (plain, parity_step(parity, OPENER, {"threads": options.threads}, engine="unquantized"))
    engine = _engine(job, options, told)
    if options.gpu_layers and not probe().devices:
        return (*common, *structure, *engine, golden_step(job))
    stage = parity_gpu if options.gpu_layers else parity
    return (
        *common,
        *structure,
        *engine,
        parity_step(stage, OPENER, {"threads": options.threads}, precision=_class(options.precision)),
        golden_step(job),
    )


def why_not(kind: str, config: Mapping[str, Any], hardware: Hardware) -> str | None:
    """Decoders of the families that llama.cpp and this target know."""
    from pipeline.stages.gguf.families import read_model

    if kind != "decoder":
        return f"no decoder: {kind}"
    try:
        read_model(config)
    except EnginewrightError as error:
        return error.message
    return None


def _told(job: Job, options: Options) -> BuildOptions:
    """What the stage is told; refuses, before anything runs, what llama.cpp or Ollama cannot do."""
    from pipeline.stages.gguf.families import read_model
    from pipeline.stages.gguf.layout import check_parameter
    from pipeline.stages.gguf.store import address

    if job.kind != "decoder":
        raise UnavailableError(f"the gguf target builds decoders, not {job.task}", hint="use another runtime for it")
    model = read_model(job.config, options.context_length)
    if "tokenizer.json" not in {file.path for file in job.sources.model.files}:
        raise UnavailableError(
            "the model has no tokenizer.json, and a GGUF file carries its tokenizer",
            hint="save it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    if options.imatrix and model.experts:
        raise UnavailableError(
            "the importance matrix of a mixture of experts is not measured", hint="leave `imatrix` out"
        )
    if options.layout == "llama.cpp" and (options.system or options.stop or options.parameters):
        raise RecipeError(
            "system, stop and parameters are Ollama's",
            hint="say `layout: modelfile` or `layout: ollama`, or remove them",
        )
    if options.layout != "ollama" and options.ollama_name:
        raise RecipeError("ollama_name belongs to `layout: ollama`", hint="remove it, or say `layout: ollama`")
    for parameter, value in options.parameters.items():
        check_parameter(parameter, value)
    called = options.ollama_name or f"{job.recipe.name}:{options.precision.lower()}"
    kv: KV = options.kv_cache if options.kv_cache != "auto" else "F32" if options.precision == "F32" else "F16"
    return BuildOptions(
        name=job.recipe.name,
        label=options.precision,
        kv=kv,
        context_length=options.context_length,
        pre_tokenizer=options.pre_tokenizer,
        allow_fallback=options.allow_fallback,
        license=job.recipe.model.license,
        layout=options.layout,
        address="/".join(address(called)[:3]) + f":{address(called)[3]}" if options.layout == "ollama" else "",
        template=options.template,
        system=options.system,
        stop=options.stop,
        parameters=options.parameters,
        gpu_layers=options.gpu_layers,
        threads=options.threads,
    )


def _engine(job: Job, options: Options, told: BuildOptions) -> tuple[Step, ...]:
    """The step `engine`, behind the one that measures the importance matrix if it is asked for."""
    native = options.precision not in ("F32", "F16")
    stage = gguf_build.NATIVE[gguf_native.installed()] if native else gguf_build.STAGE
    needs = {"model": "model"}
    if not options.imatrix:
        return (Step("engine", stage, told, needs),)
    if options.precision in ("F32", "F16", "BF16"):
        raise RecipeError(f"imatrix: {options.precision} is no quantization", hint="remove `imatrix`")
    data = job.recipe.calibration
    if data is None:
        raise RecipeError(
            "imatrix: the importance matrix is measured on calibration data, and the recipe names none",
            hint="add a `calibration:` section with `path:`, or remove `imatrix`",
        )
    asked = gguf_imatrix.ImportanceOptions(samples=data.samples, length=data.length)
    measured = Step("importance", gguf_imatrix.STAGE, asked, {"model": "model", "calibration": "calibration"})
    return (
        *fetch_data(job, "calibration"),
        measured,
        Step("engine", stage, told, {**needs, "importance": "importance"}),
    )


def _class(precision: str) -> str:
    """What a type of llama.cpp is about as large as."""
    return "fp16" if precision in ("F32", "F16", "BF16") else "int8" if precision in ("Q8_0", "Q6_K") else "int4"


def facts(engine: Mapping[str, Any], options: Options, hardware: Hardware) -> Facts:
    """Served by llama.cpp's server, or by Ollama."""
    file, layout = engine["components"]["model"], engine["layout"]
    command = {
        "llama.cpp": ("llama-server", "-m", f"{{artifact}}/{file}"),
        "modelfile": ("ollama", "create", options.ollama_name or "model", "-f", "{artifact}/Modelfile"),
        "ollama": ("env", "OLLAMA_MODELS={artifact}", "OLLAMA_NOPRUNE=1", "ollama", "serve"),
    }
    return Facts(
        requires={"xllamacpp": "2026.10"},
        layout=layout,
        entry=file,
        command=command[layout],
        device="cuda" if options.gpu_layers else "cpu",
        isa=(),
    )


def open(engine: Path, hardware: Hardware) -> Engine:
    """An Engine over llama.cpp for an engine's folder or an artifact."""
    from pipeline.targets.gguf_engine import open_engine

    return open_engine(engine)


def can_run(manifest: Mapping[str, Any], hardware: Hardware) -> Verdict:
    """Any CPU that llama.cpp is built for; an artifact with layers on a GPU needs one."""
    device = manifest["target"]["device"]["kind"]
    if device == "cuda" and not hardware.devices:
        return Verdict(False, "wants layers on a GPU, and this machine has none")
    return Verdict(True, f"llama.cpp runs it on the {device}")
