"""Nodes to typed values: the field's own type decides what a text means, and every problem is collected."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pipeline.errors import EnginewrightError
from pipeline.parse import document
from pipeline.parse.document import Node, Scalar
from pipeline.parse.problems import Place, Problem, did_you_mean, shown, suggest
from pipeline.plain import Option, members, options_of

INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
LARGEST = 2**53 - 1
"""The largest integer that every reader of JSON keeps exactly."""

INVALID: Any = object()
"""Stands for a value that was reported as a problem."""

Variant = Callable[[type, document.Mapping, str, Place], Any]
"""(declared class, node, path, where) -> the class to read the node as, or INVALID after reporting a problem."""
Metadata = Mapping[str, Any]


class Reader:
    """Reads nodes as types. `problems` holds what was wrong; a value that had problems comes back as INVALID."""

    def __init__(self, folder: Path, variant: Variant) -> None:
        self.problems: list[Problem] = []
        self.folder = folder
        self.variant = variant

    def report(self, place: Place, message: str, help_: str = "") -> Any:
        self.problems.append(Problem(place, message, help_))
        return INVALID

    def read(
        self, tp: Any, node: Node, path: str, where: Place, metadata: Metadata, *, has_default: bool = False
    ) -> Any:
        """A node as a value of type `tp`. `path` names it (`targets.cpu.bits`), `where` is the place of its key."""
        choices = [choice for choice in members(tp) if choice is not type(None)]
        if isinstance(node, Scalar) and node.is_null:
            if len(choices) < len(members(tp)):
                return None
            default = ", or remove the line for the default" if has_default else ""
            return self.report(
                where, f"'{path}' is {'null' if node.text else 'empty'}", f"write {describe(tp)}{default}"
            )
        tp = choices[0] if len(choices) == 1 else self._choose(choices, node)
        if tp is None:
            wanted = " or ".join(describe(choice) for choice in choices)
            return self.report(node.place, f"'{path}' must be {wanted}{_but(node)}")
        origin = get_origin(tp)
        if is_section(tp):
            return self._dataclass(tp, node, path, where)
        if origin is dict or tp is dict:
            return self._dict(get_args(tp)[1] if get_args(tp) else Any, node, path, where, metadata)
        if origin is tuple:
            return self._tuple(get_args(tp), node, path, metadata)
        if not isinstance(node, Scalar):
            return self.report(where, f"'{path}' must be {describe(tp)}{_but(node)}")
        return self._checked(self._scalar(tp, node, path), node, path, metadata)

    def _choose(self, choices: list[Any], node: Node) -> Any:
        """The member of a union that a node is written as, or None."""
        for choice in choices:
            if isinstance(node, document.Mapping):
                fits = is_section(choice) or dict in (choice, get_origin(choice))
            elif isinstance(node, document.Sequence):
                fits = get_origin(choice) is tuple
            else:
                fits = scalar(choice, node) is not INVALID
            if fits:
                return choice
        return None

    def _dataclass(self, cls: type, node: Node, path: str, where: Place) -> Any:
        if not isinstance(node, document.Mapping):
            names = ", ".join(option.name for option in options_of(cls))
            return self.report(where, f"{_quoted(path)} must be a mapping{_but(node)}", f"fields: {names}")
        cls = self.variant(cls, node, path, where)
        if cls is INVALID:
            return INVALID
        options = {option.name: option for option in options_of(cls)}
        values: dict[str, Any] = {}
        meant: set[str] = set()
        before = len(self.problems)
        for name, key, value in self._entries(node, path):
            option = options.get(name)
            if option is None:
                self.report(key.place, f"unknown field '{_join(path, name)}'", self._meant(name, options))
                meant.add(did_you_mean(name, options))
            else:
                values[name] = self.read(
                    option.type, value, _join(path, name), key.place, option.metadata, has_default=not option.required
                )
        for option in options.values():
            if option.required and option.name not in values and option.name not in meant:
                self.report(where, f"missing field '{_join(path, option.name)}'", _how(option))
        if len(self.problems) > before or INVALID in values.values():
            return INVALID
        try:
            return cls(**values)
        except (EnginewrightError, ValueError) as error:
            # What a class checks across its fields, in __post_init__.
            hint = getattr(error, "hint", "")
            return self.report(where, f"{_quoted(path)}: {getattr(error, 'message', error)}", hint)

    def _entries(self, node: document.Mapping, path: str) -> list[tuple[str, Scalar, Node]]:
        """Keys and values; reports keys that are no text or come twice."""
        first: dict[str, Scalar] = {}
        entries = []
        for key, value in node.entries:
            if not isinstance(key, Scalar) or key.is_null:
                self.report(key.place, f"a field of {_quoted(path)} has no name", "write `name: value`")
            elif key.text in first:
                line = first[key.text].place.line + 1
                self.report(key.place, f"'{_join(path, key.text)}' is given twice", f"first on line {line}: remove one")
            else:
                first[key.text] = key
                entries.append((key.text, key, value))
        return entries

    @staticmethod
    def _meant(name: str, options: Mapping[str, Option]) -> str:
        """Help for an unknown field: a similar name, or the section that has a field of this name."""
        if not did_you_mean(name, options):
            sections = [(option.name, part) for option in options.values() for part in members(option.type)]
            for section, part in sections:
                if is_section(part) and any(name == inner.name for inner in options_of(part)):
                    return f"did you mean '{section}.{name}'?"
        return suggest(name, list(options), "fields")

    def _dict(self, item: Any, node: Node, path: str, where: Place, metadata: Metadata) -> Any:
        if not isinstance(node, document.Mapping):
            help_ = f"write `{path.split('.')[-1]}: {{name: value}}`"
            return self.report(where, f"'{path}' must be a mapping{_but(node)}", help_)
        values = {
            name: self.read(item, value, _join(path, name), key.place, metadata)
            for name, key, value in self._entries(node, path)
        }
        return INVALID if INVALID in values.values() else values

    def _tuple(self, args: tuple[Any, ...], node: Node, path: str, metadata: Metadata) -> Any:
        if not isinstance(node, document.Sequence):
            help_ = f"write `[{node.text}]`" if isinstance(node, Scalar) and len(node.text) < 40 else "write `[a, b]`"
            return self.report(node.place, f"'{path}' must be a list{_but(node)}", help_)
        if args[-1:] != (...,) and len(args) != len(node.items):
            return self.report(node.place, f"'{path}' must have {len(args)} items, not {len(node.items)}")
        kinds = (args[0],) * len(node.items) if args[-1:] == (...,) else args
        values = tuple(
            self.read(kind, item, f"{path}[{index}]", item.place, metadata)
            for index, (kind, item) in enumerate(zip(kinds, node.items, strict=True))
        )
        return INVALID if INVALID in values else values

    def _scalar(self, tp: Any, node: Scalar, path: str) -> Any:
        value = scalar(tp, node)
        if value is not INVALID:
            return value
        help_ = ""
        if not node.plain and scalar(tp, Scalar(node.place, node.text)) is not INVALID:
            help_ = "remove the quotes"
        elif get_origin(tp) is Literal:
            choices = [_spelled(choice) for choice in get_args(tp)]
            return self.report(node.place, f"'{path}' cannot be {shown(node.text)}", suggest(node.text, choices))
        elif tp is bool and node.text.lower() in ("yes", "on", "true", "1"):
            help_ = "did you mean 'true'?"
        elif tp is bool and node.text.lower() in ("no", "off", "false", "0"):
            help_ = "did you mean 'false'?"
        elif tp in (int, float) and INTEGER.fullmatch(node.text.replace("_", "")):
            help_ = f"write at most {LARGEST}" if INTEGER.fullmatch(node.text) else "write it without '_'"
        elif tp in (int, float) and re.fullmatch("0[0-9]+|0[xo][0-9a-fA-F]+", node.text):
            help_ = "write it in decimal, without a leading zero"
        elif tp is float and (NUMBER.fullmatch(node.text) or node.text.lstrip("+-.").lower() in ("inf", "nan")):
            help_ = "write a finite number"
        return self.report(node.place, f"'{path}' must be {describe(tp)}, not {shown(node.text)}", help_)

    def _checked(self, value: Any, node: Scalar, path: str, metadata: Metadata) -> Any:
        """What the field's declaration asks beyond its type: bounds, pattern, a file that exists."""
        if value is INVALID:
            return value
        unit = f"in {metadata['unit']}" if metadata.get("unit") else ""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = metadata.get("ge"), metadata.get("le")
            if low is not None and value < low:
                return self.report(node.place, f"'{path}' must be at least {low}, not {node.text}", unit)
            if high is not None and value > high:
                return self.report(node.place, f"'{path}' must be at most {high}, not {node.text}", unit)
        if isinstance(value, str):
            pattern = metadata.get("pattern")
            if pattern and not re.fullmatch(pattern, value):
                example = f", as {metadata['example']} does" if metadata.get("example") else ""
                help_ = f"it must match {pattern}{example}"
                return self.report(node.place, f"'{path}' cannot be {shown(value)}", help_)
            if metadata.get("path"):
                return self._file(value, node, path)
        return value

    def _file(self, value: str, node: Scalar, path: str) -> Any:
        place = resolve_in(self.folder, value)
        if not value:
            return self.report(node.place, f"'{path}' is empty", "write the path of a file")
        if is_file(place):
            return value
        if is_folder(place):
            return self.report(node.place, f"'{path}': {shown(value)} is a folder, not a file")
        close = near(self.folder, value)
        help_ = f"did you mean {close!r}?" if close else "paths are relative to the folder of the recipe"
        return self.report(node.place, f"'{path}': there is no file {shown(value)}", help_)


def resolve_in(folder: Path, value: str) -> Path:
    """A path of the recipe; `~` is the home folder."""
    return folder / os.path.expanduser(value)  # noqa: PTH111  Path.expanduser raises for a user that does not exist


def is_file(place: Path) -> bool:
    return os.path.isfile(place)  # noqa: PTH113  Path.is_file raises for a name that is too long


def is_folder(place: Path) -> bool:
    return os.path.isdir(place)  # noqa: PTH112  as above


def near(folder: Path, value: str) -> str:
    """What stands in the folder that a path names and has a similar name, or ""."""
    head, slash, tail = value.rpartition("/")
    try:
        there = [each.name for each in resolve_in(folder, head + slash).iterdir()]
    except (OSError, ValueError):
        return ""
    close = did_you_mean(tail, there[:1000])
    return head + slash + close if close else ""


def is_section(tp: Any) -> bool:
    """Whether a type is a mapping of declared fields."""
    return dataclasses.is_dataclass(tp) and isinstance(tp, type)


def scalar(tp: Any, node: Scalar) -> Any:
    """The value that a text has as a type, or INVALID. Quoted text is text, never a number or a bool."""
    if tp is str:
        return node.text
    if get_origin(tp) is Literal:
        for choice in get_args(tp):
            if (node.plain or isinstance(choice, str)) and _spelled(choice) == node.text:
                return choice
        return INVALID
    if not node.plain or len(node.text) > 40:
        return INVALID
    if tp is Any:
        return next((v for kind in (bool, int, float, str) if (v := scalar(kind, node)) is not INVALID), INVALID)
    if tp is bool:
        return {"true": True, "false": False}.get(node.text, INVALID)
    if tp is int and INTEGER.fullmatch(node.text):
        return int(node.text) if abs(int(node.text)) <= LARGEST else INVALID
    if tp is float and NUMBER.fullmatch(node.text):
        value = float(node.text)
        return value if abs(value) != float("inf") else INVALID
    return INVALID


def describe(tp: Any) -> str:
    """A type in the words of a message."""
    choices = [choice for choice in members(tp) if choice is not type(None)]
    if len(choices) > 1:
        return " or ".join(describe(choice) for choice in choices)
    tp = choices[0]
    words = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    if tp in words:
        return words[tp]
    if get_origin(tp) is Literal:
        spelled = [_spelled(choice) for choice in get_args(tp)]
        return spelled[0] if len(spelled) == 1 else f"one of {', '.join(spelled)}"
    return "a list" if get_origin(tp) is tuple else "a mapping"


def _but(node: Node) -> str:
    if isinstance(node, Scalar):
        return f", not {shown(node.text)}"
    return ", not a list" if isinstance(node, document.Sequence) else ", not a mapping"


def _how(option: Option) -> str:
    example = option.metadata.get("example")
    return f"write `{option.name}: {example}` or the like" if example else f"write `{option.name}:`"


def _spelled(choice: Any) -> str:
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def _join(path: str, name: str) -> str:
    name = name if len(name) <= 60 else name[:57] + "..."
    return f"{path}.{name}" if path else name


def _quoted(path: str) -> str:
    return f"'{path}'" if path else "the recipe"
