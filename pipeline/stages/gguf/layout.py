"""How the folder of a GGUF file is arranged: for llama.cpp, for `ollama create`, or as a store that Ollama serves."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError
from pipeline.stages.genai_layout import copy_model_files
from pipeline.stages.gguf.build import BuildOptions
from pipeline.stages.gguf.families import Model
from pipeline.stages.gguf.go import go_template
from pipeline.stages.gguf.metadata import chat_template, sampling_defaults
from pipeline.stages.gguf.store import write_store
from pipeline.stages.gguf.vocab import Vocab

PARAMETERS = {
    "num_ctx": int, "num_predict": int, "seed": int, "top_k": int, "repeat_last_n": int, "temperature": float,
    "top_p": float, "min_p": float, "typical_p": float, "repeat_penalty": float, "presence_penalty": float,
    "frequency_penalty": float,
}  # fmt: skip
"""Ollama's parameters that a recipe may set, and their types."""
LEAST_CONTEXT = 4096
"""Ollama's default context on the smallest machine: a model with less has to say so."""


def arrange(
    source: Path, file: Path, model: Model, vocab: Vocab, options: BuildOptions, quantization: Mapping[str, Any]
) -> str:
    """Arrange the folder of `file`, from the model folder `source`. Returns the GGUF file's path in the folder."""
    out = file.parent
    # Not config.json: beside a GGUF file it would make Ollama and transformers see another format.
    for name in copy_model_files(source, out):
        if name == "config.json":
            (out / name).unlink()
    licenses = sorted(p for p in source.iterdir() if p.is_file() and p.name.lower().startswith(("license", "licence")))
    parameters = ollama_parameters(source, model, options)
    go, stop = go_template(source) if options.template == "go" else (None, ())
    if stops := (*options.stop, *(each for each in stop if each not in options.stop)):
        parameters["stop"] = list(stops)
    if options.layout == "ollama":
        texts = {
            "template": go,
            "system": options.system,
            "license": licenses[0].read_text("utf-8") if licenses else "",
        }
        return write_store(out, file, options.address, model, quantization, texts, parameters)
    if options.layout == "modelfile":
        modelfile = _modelfile(file.name, parameters, options.system, go)
        (out / "Modelfile").write_text(modelfile, "utf-8")
        for each in licenses[:1]:
            shutil.copyfile(each, out / "LICENSE")
    if template := chat_template(source):
        # For llama-server's --chat-template-file; the same text is in the file.
        (out / "chat_template.jinja").write_text(template, "utf-8")
    return file.name


def ollama_parameters(source: Path, model: Model, options: BuildOptions) -> dict[str, Any]:
    """Ollama's parameters: generation_config.json's sampling, the recipe's over it, a context that is small."""
    found = sampling_defaults(source)
    if model.context < LEAST_CONTEXT:
        found["num_ctx"] = model.context
    for name, value in options.parameters.items():
        check_parameter(name, value)
        found[name] = PARAMETERS[name](value)
    return dict(sorted(found.items()))


def check_parameter(name: str, value: float) -> None:
    """RecipeError for what is no parameter of Ollama, or not a whole number where one belongs."""
    if name not in PARAMETERS:
        raise RecipeError(f"ollama has no parameter '{name}'", hint=f"it has {', '.join(PARAMETERS)}; stop is `stop:`")
    if PARAMETERS[name] is int and value != int(value):
        raise RecipeError(f"ollama's parameter {name} is a whole number, not {value}")


def _modelfile(name: str, parameters: Mapping[str, Any], system: str, go: str | None) -> str:
    """A Modelfile that names the file: of a folder, Ollama would take safetensors first."""
    lines = [f"FROM ./{name}"]
    for key, value in parameters.items():
        values = value if isinstance(value, list) else [value]
        lines += [f"PARAMETER {key} {_quoted(each) if isinstance(each, str) else json.dumps(each)}" for each in values]
    if go:
        lines.append(f"TEMPLATE {_quoted(go)}")
    if system:
        lines.append(f"SYSTEM {_quoted(system)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A text as a Modelfile has it: in one quote, or in three where it holds quotes or lines."""
    if not re.search(r'["\n]', text):
        return f'"{text}"'
    if '"""' in text:
        raise RecipeError('a text of a Modelfile cannot hold """', hint="change the system message or the template")
    return f'"""{text}"""'
