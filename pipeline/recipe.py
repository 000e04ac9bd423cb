"""The recipe's types: what to build. Every option once, with its default, its unit and its docstring.

`option` declares a field: the parser, the JSON schema, the reference page and the step keys all derive from it.
"""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import Any, Literal, get_args

from pipeline.frozen import frozen

Task = Literal[
    "text-generation",
    "text2text-generation",
    "automatic-speech-recognition",
    "feature-extraction",
    "fill-mask",
    "text-classification",
    "token-classification",
    "question-answering",
    "image-classification",
]
TASKS: tuple[str, ...] = get_args(Task)

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8"]


def option(
    default: Any = MISSING,
    doc: str = "",
    *,
    unit: str = "",
    ge: float | None = None,
    le: float | None = None,
    pattern: str | None = None,
    path: bool = False,
    key: bool = True,
    example: str = "",
) -> Any:
    """Declare a recipe field.

    Without `default` the field is required; a callable default is a factory. `ge`/`le` bound numbers, `pattern` is a
    regular expression that the whole text must match, `path` marks a file path relative to the recipe, `key=False`
    keeps a field out of step keys (it says how a step runs, not what it makes).
    """
    metadata = {"doc": doc, "unit": unit, "ge": ge, "le": le, "pattern": pattern, "path": path, "key": key}
    metadata["example"] = example
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@frozen(kw_only=True)
class Model:
    """Which checkpoint to build from."""

    source: str = option(
        doc="A local folder (relative to the recipe), `hf://org/name[@revision]`, or `package://module/folder` "
        "(a model that an installed Python package carries).",
        example="hf://org/name@main",
    )
    task: Task | None = option(None, "What the model does. Inferred from config.json when not given.")
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the checkpoint. Recorded in the manifest. Leave it off if you can."
    )
    license: str = option("", "SPDX expression of the weights' licence, for the manifest.", example="Apache-2.0")


@frozen(kw_only=True)
class Data:
    """A local data file: text (documents separated by blank lines, or one sentence a line), JSONL with a `text` or
    `prompt` field, or chat JSONL with `messages`."""

    path: str = option(doc="The file, relative to the recipe.", path=True, example="data/heldout.txt")
    samples: int = option(32, "How many samples are taken, from the start of the file.", ge=1)
    length: int = option(256, "Length of a sample.", unit="tokens", ge=2)


@frozen(kw_only=True)
class Parity:
    """How the engines are held against the original checkpoint."""

    data: Data | None = option(None, "Held-out data. Without it the reference uses seeded random inputs.")
    prompts: str | None = option(
        None,
        "JSONL with `prompt` or `messages`, for the comparison of greedy continuations.",
        path=True,
        example="data/prompts.jsonl",
    )
    prompt_count: int = option(8, "How many prompts are continued.", ge=1)
    new_tokens: int = option(32, "How far each prompt is continued.", unit="tokens", ge=1)
    seed: int = option(0, "Seed of the random inputs where no data are given.", ge=0)


@frozen(kw_only=True)
class Prune:
    """2:4 sparsity: of every four neighbouring weights of a layer's products, two become zero.

    The parity gates compare with the unpruned model, so they show the cost: expect to set `gates` of your own. NVIDIA
    GPUs from compute capability 8.0 on skip the zeros (targets `tensorrt`, `tensorrt-rtx`).
    """

    method: Literal["auto", "wanda", "magnitude"] = option(
        "auto",
        "What a weight is judged by: its size times the activations that it meets on the calibration data, or its size "
        "alone. `auto`: wanda where the recipe has calibration data that the model can read, else magnitude.",
    )
    pattern: Literal["2:4"] = option("2:4", "How many stay of how many.")
    exclude: tuple[str, ...] = option(
        tuple, "Products to leave dense, by name; `*` and `?` as in file names.", example="['*layer.0.*']"
    )


@frozen(kw_only=True)
class TargetOptions:
    """What every target has in common. A backend's own options extend this class."""

    runtime: str = option(doc="Which backend builds and runs this target.", example="onnxruntime")
    hardware: str = option("host", "The machine it is for: `host` or the name of a hardware profile.")
    gates: dict[str, float | None] = option(
        dict,
        "Gates by metric name, over the defaults of the precision. `null` switches a gate off (the manifest says so).",
        example="{kld_mean: 0.002}",
    )
    unquantized_gates: dict[str, float | None] = option(
        dict, "Gates of the same engine before quantization, over the defaults of fp32.", example="{kld_mean: 1e-7}"
    )
    prune: Prune | None = option(None, "Prune the model before anything reads its weights.", example="{method: wanda}")


@frozen(kw_only=True)
class Package:
    """What the artifact says about itself."""

    description: str = option("", "One sentence for the artifact's card.")
    golden: int = option(2, "How many golden inputs travel with the artifact.", ge=1, le=16)


@frozen(kw_only=True)
class Recipe:
    """One file: a Hugging Face model and the places where it must run."""

    name: str = option(doc="Name of the artifacts.", pattern=r"[a-z0-9]+([._-][a-z0-9]+)*", example="pydoc-llama")
    version: str = option("0.1.0", "Version of the artifacts.", pattern=r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")
    model: Model = option(doc="Which checkpoint to build from.")
    calibration: Data | None = option(None, "Data for quantization that calibrates. Never used to judge the result.")
    parity: Parity = option(Parity, "How the engines are held against the original checkpoint.")
    targets: dict[str, TargetOptions] = option(doc="The places to run, each with a name of your own.")
    package: Package = option(Package, "What the artifact says about itself.")
    toolchains: dict[str, str] = option(
        dict, "Interpreters by name, for stages whose packages do not install beside today's.", key=False
    )
