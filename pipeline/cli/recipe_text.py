"""The text of a new recipe: the fields' own docs as comments, and what is not set commented out."""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from pipeline.plain import Option, members, options_of
from pipeline.recipe import Recipe

WIDTH = 100
EXAMPLES = {"calibration.path": "data/calibration.txt", "parity.prompts": "data/prompts.jsonl"}
"""Shown where the field's own example would mislead."""

Values = Mapping[str, Any]
Targets = Mapping[str, tuple[type, Values, str]]
"""Name -> the backend's Options, the fields that are set, and why."""


def recipe_text(values: Values, targets: Targets, path: str) -> str:
    """A recipe to be written to `path`. `values` are the fields that are set but the targets, sections as dicts."""
    head = [
        f"# {values['name']}, {values['model']['task']}. Build it with `enginewright build {path}`.",
        "# `enginewright schema` prints a JSON schema of every field, for editors.",
    ]
    lines = []
    for option in options_of(Recipe):
        lines += ["", *_field(option, values.get(option.name), _target_lines(targets))]
    return "\n".join([*head, *lines, ""])


def _target_lines(targets: Targets) -> list[str]:
    """The first target of each backend shows every option, the others what they set."""
    lines, seen = [], set()
    for name, (options, values, reason) in targets.items():
        fields = [f"{key}: {_scalar(value)}" for key, value in values.items()]
        if options not in seen:
            fields = _section(options, values)
        seen.add(options)
        lines += [*_comment(reason), f"{name}:", *_indent(fields)]
    return lines


def _section(cls: type, values: Values) -> list[str]:
    return [line for option in options_of(cls) for line in _field(option, values.get(option.name))]


def _field(option: Option, value: Any, target_lines: list[str] | None = None) -> list[str]:
    """A field with its doc above it; commented out when it has no value."""
    doc, unit = option.metadata.get("doc", ""), option.metadata.get("unit")
    comment = _comment(f"{doc} In {unit}." if unit else doc)
    part = _part(option)
    if option.name == "targets" and target_lines is not None:
        return [*comment, "targets:", *_indent(target_lines)]
    if part and value:
        return [*comment, f"{option.name}:", *_indent(_section(part, value))]
    if value:
        return [*comment, f"{option.name}: {_scalar(value)}"]
    return [*comment, *(f"# {line}" for line in _unset(option, option.name))]


def _unset(option: Option, path: str) -> list[str]:
    """A field that is not set as it would be written: its default, or an example where the default is nothing."""
    if part := _part(option):
        inside = [line for inner in options_of(part) for line in _unset(inner, f"{path}.{inner.name}")]
        return [f"{option.name}:", *_indent(inside)]
    default = None if option.required else option.default()
    example = EXAMPLES.get(path) or option.metadata.get("example")
    return [f"{option.name}: {example if example and not default else _scalar(default)}"]


def _part(option: Option) -> type | None:
    """The section that a field holds."""
    return next(
        (each for each in members(option.type) if isinstance(each, type) and dataclasses.is_dataclass(each)), None
    )


def _scalar(value: Any) -> str:
    """A value as YAML that every reader of YAML understands alike."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_scalar(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_scalar(item)}' for key, item in value.items())}}}"
    text = str(value)
    number = re.fullmatch(r"[-+.0-9_eExXoO:]*", text) and text.count(".") < 2
    word = text.lower() in ("null", "true", "false", "yes", "no", "on", "off", "y", "n", "~")
    plain = re.fullmatch(r"[\w~./][\w./@:+~-]*", text, re.ASCII) and not text.endswith(":")
    if not isinstance(value, str) or (plain and not number and not word):
        return text
    return json.dumps(text, ensure_ascii=False)


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH)]


def _indent(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]
