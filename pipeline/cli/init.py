"""`enginewright init`: a commented recipe fitted to a model and to this host."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import click

from pipeline.cli.recipe_text import Values, recipe_text
from pipeline.errors import RecipeError, UnavailableError
from pipeline.hardware import Hardware
from pipeline.plain import options_of

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

PRECISIONS = {"decoder": ("int8", "int4", "Q8_0", "Q4_K_M"), "seq2seq": ("int8",), "encoder": ("int8",)}
"""What pays on a CPU, by the model's kind."""
FAST_INT8 = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "dotprod", "avx2", "neon")
"""CPU features that make 8-bit integers faster than fp32, the fastest first."""


@click.command()
@click.argument("model")
@click.option(
    *("--output", "-o"),
    type=click.Path(path_type=Path),
    default=Path("recipe.yaml"),
    show_default=True,
    help="The file to write.",
)
@click.option("--name", help="Name of the artifacts. Default: the model's.")
@click.option("--data", type=FILE, help="Held-out data that the engines are judged on.")
@click.option("--calibration", type=FILE, help="Data for quantization that calibrates.")
@click.option("--prompts", type=FILE, help="Prompts whose greedy continuations are compared.")
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
def init(
    model: str,
    output: Path,
    name: str | None,
    data: Path | None,
    calibration: Path | None,
    prompts: Path | None,
    force: bool,
) -> None:
    """Write a commented recipe for MODEL: a folder, hf://org/name[@revision] or package://module/folder."""
    from pipeline import hardware
    from pipeline.source import TEXT
    from pipeline.stages.tasks import infer_task, kind_of

    if output.exists() and not force:
        raise RecipeError(f"{output} is there already", hint="give another file with --output, or --force")
    if not output.parent.is_dir():
        raise RecipeError(f"there is no folder {output.parent}", hint="make it first")
    for file in (data, calibration, prompts):
        if file and file.suffix.lower() not in TEXT:
            raise RecipeError(f"{file}: no data file has the suffix {file.suffix!r}", hint=f"use {', '.join(TEXT)}")

    def beside(path: Path) -> str:
        return str(path) if path.is_absolute() else Path(os.path.relpath(path, output.parent)).as_posix()

    with _opened(model) as folder:
        task = infer_task(folder)
        config = json.loads((folder / "config.json").read_bytes())
    targets = _targets(kind_of(task), config, hardware.probe())
    values: dict[str, Any] = {
        "name": name or _name(model),
        "version": "0.1.0",
        "model": {"source": model if _is_address(model) else beside(Path(model)), "task": task},
        "calibration": {"path": beside(calibration)} if calibration else {},
        "parity": {
            **({"data": {"path": beside(data)}} if data else {}),
            **({"prompts": beside(prompts)} if prompts else {}),
        },
    }
    _write(output, recipe_text(values, targets, str(output)))
    click.echo(f"wrote {output}: {task}, targets {', '.join(targets)}")
    click.echo(f"next: enginewright build {output}")


@contextmanager
def _opened(model: str) -> Iterator[Path]:
    """A folder that holds the model's config.json, and modules.json if the model has one."""
    from pipeline.source import HUB, PACKAGE

    if match := PACKAGE.fullmatch(model):
        spec = importlib.util.find_spec(match["package"])
        if spec is None or not spec.submodule_search_locations:
            hint = f"pip install {match['package'].replace('_', '-')}"
            raise UnavailableError(f"{model}: the Python package {match['package']} is not installed", hint=hint)
        yield Path(next(iter(spec.submodule_search_locations))) / (match["folder"] or "")
    elif match := HUB.fullmatch(model):
        from pipeline.hub.download import download
        from pipeline.hub.listing import listing

        commit, files = listing(match["repo"], match["revision"])
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / match["repo"].rpartition("/")[2]
            folder.mkdir()
            for file in files:
                if file.path in ("config.json", "modules.json"):
                    download(match["repo"], commit, file, folder / file.path)
            yield folder
    elif Path(model).is_dir():
        yield Path(model).resolve()
    elif HUB.fullmatch(f"hf://{model}"):
        raise RecipeError(f"there is no folder {model}", hint=f"for the Hugging Face hub write hf://{model}")
    else:
        raise RecipeError(f"there is no folder {model}", hint="give a Hugging Face model folder, or hf://org/name")


def _is_address(model: str) -> bool:
    return model.startswith(("hf://", "package://"))


def _name(model: str) -> str:
    """The last part of a source as a name of artifacts."""
    text = model.partition("@")[0] if _is_address(model) else Path(model).resolve().as_posix()
    parts = [part for part in text.split("/") if part and part != "model"]
    return "-".join(re.findall(r"[a-z0-9]+(?:\.[a-z0-9]+)*", parts[-1].lower() if parts else "")) or "model"


def _targets(kind: str, config: Mapping[str, Any], host: Hardware) -> dict[str, tuple[type, Values, str]]:
    """Name -> Options, values and the reason, for what this host can build and run."""
    from pipeline import targets
    from pipeline.cli.doctor import runtime_state

    found: dict[str, tuple[type, Values, str]] = {}
    missing = []
    for runtime in targets.names():
        state = runtime_state(runtime)
        if not state["ok"]:
            missing.append(f"{runtime}: {state['reason']}")
            continue
        target = targets.load(runtime)
        if (why_not := target.why_not(kind, config, host)) is not None:
            missing += [f"{runtime}: {why_not}"] if why_not else []
            continue
        for precision, reason in _precisions(target.Options, kind, host):
            called = precision.lower()
            name = f"cpu-{called}" if f"cpu-{called}" not in found else f"{runtime}-{called}"
            found[name] = target.Options, {"runtime": runtime, "precision": precision}, reason
    if not found:
        raise UnavailableError("no backend here builds it", hint="\n".join(missing))
    return found


def _precisions(options: type, kind: str, host: Hardware) -> Iterator[tuple[str, str]]:
    """The precisions that suit the host's CPU, of those that the backend has, each with the reason."""
    known = {option.name: option for option in options_of(options)}
    offered = get_args(known["precision"].type) if "precision" in known else ()
    fast = next((feature for feature in FAST_INT8 if feature in host.isa), "")
    for precision in PRECISIONS[kind] if fast else ("fp32", "Q8_0"):
        if precision in offered:
            reasons = {
                "int8": f"A quarter of fp32's size; this CPU computes in 8 bits with {fast}.",
                "int4": "An eighth of fp32's size: the fastest decoding, for a larger loss.",
                "Q8_0": "A file for llama.cpp and Ollama, half of fp16's size, with hardly a loss.",
                "Q4_K_M": "A file for llama.cpp and Ollama, in the type that most people run.",
                "fp32": "This CPU has no instructions that make smaller integers faster.",
            }
            yield precision, reasons[precision]


def _write(output: Path, text: str) -> None:
    """Read the text back as `build` will, then put it in place whole."""
    from pipeline.cli.prepare import read

    scratch = output.with_name(f".{output.stem}.{os.getpid()}.yaml")
    try:
        scratch.write_text(text, encoding="utf-8")
        try:
            read(scratch)
        except RecipeError as error:
            raise RecipeError(error.message.replace(str(scratch), str(output)), hint=error.hint) from None
        scratch.replace(output)
    except OSError as error:
        raise RecipeError(f"cannot write {output}: {error.strerror}", hint="give another file with --output") from None
    finally:
        scratch.unlink(missing_ok=True)
