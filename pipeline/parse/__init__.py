"""YAML to Recipe: strict, all errors at once, each with file, line, column and what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError, UnavailableError
from pipeline.parse import document, override
from pipeline.parse.document import Node, Scalar
from pipeline.parse.problems import Place, Source, UnreadableError, did_you_mean, error_of, shown, suggest
from pipeline.parse.typed import INVALID, Reader, is_file, is_folder, near, resolve_in
from pipeline.plain import from_plain
from pipeline.recipe import Recipe, TargetOptions
from pipeline.source import HUB, PACKAGE

TARGET_NAME = r"[a-z0-9]+([._-][a-z0-9]+)*"
HUB_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)/?")

OptionsOf = Callable[[str], type | None]
"""Runtime -> the backend's Options, which extend TargetOptions; raises UnavailableError when it is not installed."""


def load_recipe(
    path: Path,
    options_of: OptionsOf,
    runtimes: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    hardware: Sequence[str] = (),
    metrics: Sequence[str] = (),
) -> Recipe:
    """Read a recipe file, with `--set` overrides (`targets.cpu.quantize.group_size=64`) applied before typing.

    `runtimes` are the names that `targets.<name>.runtime` may take; `hardware` and `metrics`, when given, are the names
    of hardware profiles and of gates. Raises one RecipeError with every problem, or the UnavailableError of a target's
    backend when nothing else is wrong.
    """
    source, text = _read_file(path)
    reading = _Reading(path.parent, options_of, runtimes)
    reader = reading.reader
    try:
        root = document.read(source, text)
    except UnreadableError as stop:
        raise error_of(str(path), [stop.problem]) from None
    for order, each in enumerate(overrides, 1):
        try:
            root = override.apply(root, each, order)
        except UnreadableError as stop:
            reader.problems.append(stop.problem)
    if root is None:
        raise RecipeError(f"{path} is empty", hint="`enginewright init MODEL` writes a recipe")
    recipe = reader.read(Recipe, root, "", root.place, {})
    if isinstance(root, document.Mapping):
        _check_targets(root, reader, hardware, metrics)
        _check_source(root, reader)
    if reader.problems:
        raise error_of(str(path), reader.problems)
    if reading.unavailable:
        raise reading.unavailable
    assert isinstance(recipe, Recipe)
    return recipe


def resolve(recipe_path: Path, value: str) -> Path:
    """The file or folder that a path in a recipe names: relative to the recipe's folder; `~` is the home folder."""
    return resolve_in(recipe_path.parent, value)


def recipe_from_plain(data: Any, options_of: OptionsOf) -> Recipe:
    """The recipe that `to_plain` was given, as from a manifest. Raises ValueError with the path of what is wrong."""

    def variant(cls: type, fields: Mapping[str, Any]) -> type:
        return (options_of(str(fields.get("runtime"))) or cls) if cls is TargetOptions else cls

    return from_plain(Recipe, data, variant=variant)


class _Reading:
    """A Reader that takes each target as its runtime's Options."""

    def __init__(self, folder: Path, options_of: OptionsOf, runtimes: Sequence[str]) -> None:
        self.options_of, self.runtimes = options_of, runtimes
        self.unavailable: UnavailableError | None = None
        self.classes: dict[str, type | None] = {}
        self.reader = Reader(folder, self.variant)

    def variant(self, cls: type, node: document.Mapping, path: str, where: Place) -> Any:
        if cls is not TargetOptions:
            return cls
        runtime = node.get("runtime")
        if not isinstance(runtime, Scalar) or runtime.is_null:
            help_ = f"write `runtime:` and one of {', '.join(self.runtimes)}"
            message = f"missing field '{path}.runtime'" if runtime is None else f"'{path}.runtime' must be a name"
            for key, _ in node.entries:
                if isinstance(key, Scalar) and runtime is None and did_you_mean(key.text, ["runtime"]):
                    where, message = key.place, f"unknown field '{path}.{key.text}'"
                    help_ = "did you mean 'runtime'?"
            return self.reader.report(where, message, help_)
        name = runtime.text
        if name not in self.runtimes:
            self.reader.report(runtime.place, f"there is no runtime {shown(name)}", suggest(name, self.runtimes))
            # The other fields are judged by the runtime that was probably meant.
            name = did_you_mean(name, self.runtimes)
        return (self.class_of(name) if name else None) or INVALID

    def class_of(self, runtime: str) -> type | None:
        if runtime not in self.classes:
            self.classes[runtime] = None
            try:
                self.classes[runtime] = self.options_of(runtime)
            except UnavailableError as error:
                self.unavailable = self.unavailable or error
        return self.classes[runtime]


def _read_file(path: Path) -> tuple[Source, str]:
    name = str(path)
    try:
        if path.is_dir():
            inside = sorted(each.name for each in path.iterdir() if each.suffix in (".yaml", ".yml"))
            hint = f"recipes in it: {', '.join(inside[:8])}" if inside else "give the path of a recipe file"
            raise RecipeError(f"{name} is a folder, not a recipe", hint=hint)
        with path.open("rb") as file:
            data = file.read(document.MAX_BYTES + 1)
    except FileNotFoundError:
        close = near(Path(), name)
        hint = f"did you mean {close!r}?" if close else "`enginewright init MODEL` writes a recipe"
        raise RecipeError(f"there is no file {name}", hint=hint) from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read {shown(name)}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > document.MAX_BYTES:
        raise RecipeError(f"{name} is larger than {document.MAX_BYTES} bytes: not a recipe")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(document.LINE_BREAK.split(data[: error.start].decode("utf-8", "replace")))
        raise RecipeError(f"{name}:{line}: byte {error.start} is not UTF-8", hint="save the file as UTF-8") from None
    return Source(name, document.lines_of(text)), text


def _check_targets(root: document.Mapping, reader: Reader, hardware: Sequence[str], metrics: Sequence[str]) -> None:
    """What the types of targets do not say: at least one, names that can be file names, known hardware and gates."""
    targets = root.get("targets")
    if not isinstance(targets, document.Mapping):
        return
    if not targets.entries:
        reader.report(targets.place, "'targets' is empty", "name at least one place to run")
    for key, target in targets.entries:
        if isinstance(key, Scalar) and not key.is_null and not re.fullmatch(TARGET_NAME, key.text):
            help_ = "use lower-case letters and digits, joined by single . _ or -"
            reader.report(key.place, f"{shown(key.text)} cannot be the name of a target", help_)
        if not isinstance(target, document.Mapping):
            continue
        machine = target.get("hardware")
        if hardware and isinstance(machine, Scalar) and not machine.is_null and machine.text not in hardware:
            reader.report(machine.place, f"there is no hardware {shown(machine.text)}", suggest(machine.text, hardware))
        gates = target.get("gates")
        for gate, _ in gates.entries if metrics and isinstance(gates, document.Mapping) else ():
            if isinstance(gate, Scalar) and gate.text not in metrics:
                reader.report(gate.place, f"there is no metric {shown(gate.text)}", suggest(gate.text, metrics))


def _check_source(root: document.Mapping, reader: Reader) -> None:
    """Whether `model.source` is a hub address or a local folder that holds a model."""
    model = root.get("model")
    source: Node | None = model.get("source") if isinstance(model, document.Mapping) else None
    if not isinstance(source, Scalar) or source.is_null:
        return
    value, place = source.text, source.place
    folder = resolve_in(reader.folder, value)
    page = HUB_PAGE.fullmatch(value)
    if page:
        reader.report(place, "'model.source' is the address of a web page", f"did you mean 'hf://{page.group(1)}'?")
    elif value.startswith("hf:"):
        if not HUB.fullmatch(value):
            help_ = "write `hf://org/name` or `hf://org/name@revision`"
            reader.report(place, f"'model.source' cannot be {shown(value)}", help_)
    elif value.startswith("package:"):
        if not PACKAGE.fullmatch(value):
            help_ = "write `package://module/folder`"
            reader.report(place, f"'model.source' cannot be {shown(value)}", help_)
    elif not value or not is_folder(folder):
        close = near(reader.folder, value)
        hub = f"for the Hugging Face hub write 'hf://{value}'"
        help_ = "" if not HUB.fullmatch(f"hf://{value}") or value.startswith(".") else hub
        help_ = f"did you mean {close!r}?" if close else help_ or "paths are relative to the folder of the recipe"
        reader.report(place, f"'model.source': there is no folder {shown(value)}", help_)
    elif not is_file(folder / "config.json"):
        help_ = "give a Hugging Face model folder, the one that save_pretrained writes"
        reader.report(place, f"'model.source': {shown(value)} has no config.json", help_)
