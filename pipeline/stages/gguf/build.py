"""Stage `gguf.build`: a Hugging Face checkpoint becomes a GGUF file of one type in one streaming pass.

Every tensor is read, brought into llama.cpp's form, quantized by llama.cpp's own kernels and written before the next
one is touched. There is no unquantized file in between: for a 7B that saves 14 GB of disk a recipe.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import StageError
from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.size import holding
from pipeline.step import Inputs, Progress, Stage

Label = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "IQ4_XS", "IQ4_NL", "MXFP4",
]  # fmt: skip
KV = Literal["F32", "F16"]
Layout = Literal["llama.cpp", "modelfile", "ollama"]


@frozen(kw_only=True)
class BuildOptions:
    """What file to write, and into which folder layout."""

    name: str = option(doc="Name of the model.")
    label: Label = option(doc="Type of the file.")
    kv: KV = option("F16", "Type of the KV cache that the engine is judged with.")
    context_length: int | None = option(None, "Longest context. Not given: what config.json says.", unit="tokens")
    pre_tokenizer: str | None = option(
        None, "llama.cpp's name of the pre-tokenizer, where it is not told by its regex."
    )
    allow_fallback: bool = option(False, "Accept a file that holds none of its label's type.")
    license: str = option("", "SPDX expression.")
    layout: Layout = option("llama.cpp", "How the folder is arranged.")
    address: str = option("", "Layout ollama: host/namespace/model:tag.")
    template: Literal["jinja", "go"] = option("jinja", "The template that Ollama gets.")
    system: str = option("", "System message of the Modelfile or the store.")
    stop: tuple[str, ...] = option((), "Texts that end a generation.")
    parameters: Mapping[str, float] = option(dict, "Ollama's parameters, over those of generation_config.json.")
    gpu_layers: int = option(0, "Layers on the GPU.")
    threads: int = option(0, "Threads of the engine.")


def run(inputs: Inputs, options: BuildOptions, out: Path, progress: Progress) -> None:
    """inputs: model, and importance if it is measured. Writes the file in its layout, the tokenizer and engine.json."""
    from pipeline.stages.gguf.layout import arrange

    file = out / f"{options.name}-{options.label}.gguf"
    model, vocab, quantization = write(inputs, options, file, progress)
    placed = arrange(inputs["model"], file, model, vocab, options, quantization)
    engine = {
        "runtime": "gguf",
        "task": "text-generation",
        "kind": "decoder",
        "components": {"model": placed},
        "interface": {
            "inputs": [
                {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]},
                {"name": "attention_mask", "dtype": "int64", "shape": ["batch", "sequence"]},
            ],
            "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", "sequence", len(vocab.tokens)]}],
        },
        "decoder": {
            "vocab_size": len(vocab.tokens),
            "context_length": model.context,
            "eos_token_ids": list(vocab.ends),
            "bos_token_id": vocab.special["bos"],
        },
        "layout": options.layout,
        "address": options.address,
        "precision": options.label,
        "quantization": quantization,
        "settings": {"kv": options.kv, "gpu_layers": options.gpu_layers, "threads": options.threads},
    }
    (out / "engine.json").write_text(json.dumps(engine, indent=2) + "\n", encoding="utf-8")


def write(inputs: Inputs, options: BuildOptions, file: Path, progress: Progress) -> tuple[Any, Any, dict[str, Any]]:
    """Write the GGUF file. Returns the gguf_families.Model, the gguf_vocab.Vocab and the manifest's words of types."""
    import gguf

    from pipeline.stages.checkpoint import Checkpoint
    from pipeline.stages.gguf.families import read_model
    from pipeline.stages.gguf.file import write_tensors
    from pipeline.stages.gguf.imatrix import read_importance
    from pipeline.stages.gguf.metadata import add_keys, chat_template
    from pipeline.stages.gguf.mix import choose, mixes
    from pipeline.stages.gguf.native import quantizer
    from pipeline.stages.gguf.tensors import tensors
    from pipeline.stages.gguf.vocab import read_vocab

    if options.label not in ("F32", "F16"):
        quantizer()  # before anything is read: UnavailableError where no library has the kernels
    checkpoint = Checkpoint(inputs["model"])
    model = read_model(checkpoint.config, options.context_length)
    outs = tensors(model, checkpoint)
    rows = next(out.shape[0] for out in outs if out.name == "token_embd.weight")
    vocab = read_vocab(inputs["model"], rows, options.pre_tokenizer)
    importance = read_importance(inputs["importance"]) if "importance" in inputs else {}
    tied = all(out.name != "output.weight" for out in outs)
    choices = {
        out.name: choose(options.label, model, out.name, out.shape, tied=tied, important=bool(importance))
        for out in outs
    }
    quantization = summary(options.label, outs, choices)
    quantization["importance"] = bool(importance)
    if not quantization["tensors"].get(mixes()[options.label]["default"]) and not options.allow_fallback:
        raise _nothing_of(options.label, outs, choices, quantization)
    writer = gguf.GGUFWriter(str(file), model.arch)
    template = chat_template(inputs["model"])
    ftype = mixes()[options.label]["ftype"]
    add_keys(writer, model, vocab, name=options.name, ftype=ftype, template=template, license=options.license)
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    sizes = write_tensors(writer, outs, choices, importance, threads, progress)
    writer.close()
    bits, values = 8 * sum(sizes.values()), sum(_elements(out) for out in outs)
    quantization["bits_per_weight"] = round(bits / values, 4)
    return model, vocab, quantization


def summary(label: str, outs: Sequence[Any], choices: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says: tensors by type, and those that got another type than the rules ask for."""
    replaced = Counter(
        f"{choice.wanted} -> {choice.type}" for choice in choices.values() if choice.wanted != choice.type
    )
    return {
        "label": label,
        "tensors": dict(sorted(Counter(choice.type for choice in choices.values()).items())),
        "replaced": dict(sorted(replaced.items())),
    }


def _nothing_of(label: str, outs: Sequence[Any], choices: Mapping[str, Any], said: Mapping[str, Any]) -> StageError:
    from pipeline.stages.gguf.mix import BLOCKS, mixes

    kind = mixes()[label]["default"]
    columns = sorted({out.columns for out in outs if choices[out.name].wanted != choices[out.name].type})
    why = f"rows of {', '.join(map(str, columns))} values do not divide by its block of {BLOCKS[kind]}"
    if not columns:
        why = "it is for the experts of a mixture, and this model has none"
    return StageError(
        f"a file labelled {label} would hold no tensor of type {kind}: {why}; "
        f"it would hold {', '.join(f'{count} {name}' for name, count in said['tensors'].items())}",
        hint="ask for Q8_0, or accept it with `allow_fallback: true`: the manifest says what is in the file",
    )


def _elements(out: Any) -> int:
    count = 1
    for size in out.shape:
        count *= size
    return count


STAGE = Stage("gguf.build", run, version=1, tools=("gguf", "numpy", "tokenizers"), memory=holding(130, largest=0.25))
STAGE_XLLAMACPP = Stage(
    "gguf.build", run, version=1, tools=(*STAGE.tools, "xllamacpp"), memory=holding(130, largest=0.25)
)
STAGE_LLAMA_CPP = Stage(
    "gguf.build", run, version=1, tools=(*STAGE.tools, "llama_cpp_python"), memory=holding(130, largest=0.25)
)
NATIVE = {"xllamacpp": STAGE_XLLAMACPP, "llama_cpp_python": STAGE_LLAMA_CPP}
"""With llama.cpp's kernels: the distribution that brings them, whose version enters the key."""
