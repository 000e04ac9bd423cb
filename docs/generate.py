"""Writes docs/recipe.md from the recipe's types and docs/cli.md from the commands' help; --check only compares."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from pipeline import targets
from pipeline.cli.main import VERBS, cli
from pipeline.hardware import names as hardware_names
from pipeline.parity import gates
from pipeline.plain import Option, members, options_of
from pipeline.recipe import Recipe, TargetOptions
from pipeline.schema import summary

DOCS = Path(__file__).parent
GENERATED = "<!-- Written by docs/generate.py. Change the declarations in pipeline/, not this page. -->\n"
HELP_WIDTH = 100

INTRODUCTION = """\
A recipe is one YAML file. Paths in it are relative to its folder.

```yaml
name: pydoc-llama
model:
  source: models/pydoc-llama
parity:
  data: {path: data/pydoc-heldout.txt}
targets:
  cpu-int8:
    runtime: onnxruntime
    precision: int8
```

How it is read:

* Every field below is known and nothing else is: an unknown field, a wrong value or a missing file is an error with
  file, line and column. All errors are reported at once, with exit code 64.
* The field's type decides what a text means, not YAML's guess. In a text field `no`, `1.0` and `0x10` are text. `true`
  and `false` are the only booleans, numbers are decimal (`64`, `0.002`, `1e-9`), and what stands in quotes is text.
* `null` is a value only where the type says so. To get a default, leave the field out.
* Anchors, aliases and merge keys (`<<: *base`) work, within bounds; tags, several documents, and files above 1 MiB do
  not.
* `build --set targets.cpu-int8.precision=int4` changes one field for one build, as if it stood in the file. The value
  is YAML: `null`, `[a, b]` and `{a: 1}` work. Missing sections are made.
* `enginewright init MODEL` writes a recipe to start from, `enginewright schema` prints a JSON schema for editors.
"""


def recipe_page() -> str:
    """The reference of every field, a table a section."""
    parts = [GENERATED, "# Recipe", INTRODUCTION, "## The recipe", summary(Recipe), table(Recipe)]
    for path, cls in sections(Recipe):
        if cls is not TargetOptions:
            parts += [f"## `{path}`", summary(cls), table(cls)]
            continue
        parts += [
            "## `targets.<name>`",
            summary(cls),
            "Names are lower-case letters and digits, joined by single `.`, `_` or `-`.",
            table(cls),
            f"`hardware` is one of {', '.join(f'`{name}`' for name in hardware_names())}.",
            "`gates` are set for these metrics:",
            metrics_table(),
        ]
        for runtime in targets.names():
            parts += runtime_parts(runtime)
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def runtime_parts(runtime: str) -> Iterator[str]:
    """A backend's own fields."""
    options = targets.load(runtime).Options
    common = {option.name for option in options_of(TargetOptions)}
    yield f"## `targets.<name>` with `runtime: {runtime}`"
    yield summary(options)
    yield table(options, without=common)
    for path, cls in sections(options, "targets.<name>"):
        yield f"### `{path}` with `runtime: {runtime}`"
        yield summary(cls)
        yield table(cls)


def metrics_table() -> str:
    """What a gate can be set for."""
    rows = ["| metric | kinds of model | passes when | unit | meaning |", "|---|---|---|---|---|"]
    for name, metric in gates.metrics().items():
        if metric.direction:
            passes = f"at {'most' if metric.direction == 'max' else 'least'} the gate"
            cells = (f"`{name}`", ", ".join(metric.kinds), passes, metric.unit, metric.description)
            rows.append(row(cells))
    return "\n".join(rows)


def row(cells: Iterable[str]) -> str:
    """A table's row. A pipe ends a cell, also within code."""
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def sections(cls: type, path: str = "") -> Iterator[tuple[str, type]]:
    """The sections within a section, depth first, in the order of their declaration."""
    for option in options_of(cls):
        inside = f"{path}.{option.name}" if path else option.name
        for choice in members(option.type):
            item = get_args(choice)[1] if get_origin(choice) is dict else choice
            if isinstance(item, type) and dataclasses.is_dataclass(item):
                yield inside, item
                yield from sections(item, inside)


def table(cls: type, without: set[str] | frozenset[str] = frozenset()) -> str:
    """The fields of a section as a Markdown table."""
    rows = ["| field | type | default | unit | meaning | example |", "|---|---|---|---|---|---|"]
    for option in options_of(cls):
        if option.name in without:
            continue
        about = option.metadata
        cells = [
            f"`{option.name}`",
            type_text(option.type, about),
            "**required**" if option.required else default_text(option),
            about.get("unit", ""),
            about.get("doc", ""),
            f"`{about['example']}`" if about.get("example") else "",
        ]
        rows.append(row(cells))
    return "\n".join(rows)


def default_text(option: Option) -> str:
    """A default as it would be written; a section's are in its own table."""
    default = option.default()
    if dataclasses.is_dataclass(default):
        return "its defaults"
    if default is None or isinstance(default, bool):
        return f"`{str(default).lower()}`".replace("none", "null")
    if isinstance(default, (tuple, dict)) and not default:
        return "`[]`" if isinstance(default, tuple) else "`{}`"
    if isinstance(default, tuple):
        return f"`[{', '.join(str(item) for item in default)}]`"
    return "`''`" if default == "" else f"`{default}`"


def type_text(tp: Any, about: Any) -> str:
    """A type with its bounds, in words."""
    choices = members(tp)
    if len(choices) > 1:
        return " or ".join(type_text(choice, about) for choice in choices)
    origin, args = get_origin(tp), get_args(tp)
    if tp is types.NoneType:
        return "`null`"
    if origin is Literal:
        return ", ".join(f"`{str(arg).lower() if isinstance(arg, bool) else arg}`" for arg in args)
    if origin is tuple:
        return f"list of {type_text(args[0], about)}"
    if origin is dict:
        inner = "section" if args[1] is TargetOptions else type_text(args[1], about)
        return f"mapping of name to {inner}"
    if dataclasses.is_dataclass(tp):
        return "section"
    low, high = about.get("ge"), about.get("le")
    bounds = f", {low} to {high}" if low is not None and high is not None else ""
    bounds = bounds or (f", at least {low}" if low is not None else f", at most {high}" if high is not None else "")
    if tp is str:
        pattern = f" matching `{about['pattern']}`" if about.get("pattern") else ""
        return "file" if about.get("path") else f"text{pattern}"
    return {bool: "`true`, `false`", int: f"integer{bounds}", float: f"number{bounds}"}[tp]


def cli_page() -> str:
    """The help of every command."""
    # Children inherit width and help options from the context of the whole command, as they do when it runs.
    width: dict[str, Any] = {"terminal_width": HELP_WIDTH, "max_content_width": HELP_WIDTH}
    with click.Context(cli, info_name="enginewright", **width, **cli.context_settings) as root:
        parts = [GENERATED, "# Commands", help_block(root)]
        for verb in VERBS:
            parts += command_parts(verb, root)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def command_parts(name: str, parent: click.Context) -> Iterator[str]:
    """A command's help, and that of the commands within it."""
    assert isinstance(parent.command, click.Group)
    command = parent.command.get_command(parent, name)
    assert command is not None
    with command.make_context(name, [], parent=parent, resilient_parsing=True) as context:
        yield f"## `{context.command_path}`"
        yield help_block(context)
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                yield from command_parts(inner, context)


def help_block(context: click.Context) -> str:
    return f"```text\n{context.command.get_help(context)}\n```"


def main(check: bool) -> int:
    """Write the pages, or with `check` name those that are out of date: 1 if there are any."""
    stale = []
    for page, text in {"recipe.md": recipe_page(), "cli.md": cli_page()}.items():
        place = DOCS / page
        if check and (not place.exists() or place.read_text(encoding="utf-8") != text):
            stale.append(page)
        elif not check:
            place.write_text(text, encoding="utf-8")
    if stale:
        print(f"out of date: {', '.join(f'docs/{page}' for page in stale)}; run `python docs/generate.py`")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
