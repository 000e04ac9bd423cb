"""YAML text to a bounded tree of nodes that know their place: no tags, no guessed types, no bombs.

The tree is built from parser events instead of `yaml.compose`, whose recursion and alias handling have no bound.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipeline.parse.problems import Place, Problem, Source, UnreadableError, did_you_mean, shown

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 200_000
"""Nodes after aliases are expanded."""

LINE_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
NOT_YAML = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

# The C parser is 17 times faster (0.012 s for 1000 targets). The Base loaders resolve no types: the recipe's own
# types say what a scalar is.
Loader: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)

HELP = {
    "mapping values are not allowed": "put text that contains ': ' in quotes, or check the indentation",
    "tab character": "indent with spaces, not tabs",
    "cannot start any token": "indent with spaces, not tabs; put text that starts with @ ` or % in quotes",
    "could not find expected ':'": "a field is written `name: value`",
    "did not find expected key": "check the indentation against the lines above",
    "<block end>": "check the indentation against the lines above",
    "did not find expected '-'": "check the indentation against the lines above",
    "expected ',' or ']'": "a list is written `[a, b]`",
    "expected ',' or '}'": "a mapping is written `{a: 1, b: 2}`",
    "unexpected end of stream": "a quote that was opened is not closed",
    "unknown escape": "write \\\\ for a backslash, or use single quotes",
}
"""What to do about the commonest complaints of the C and the Python parser, by a part of their text."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """Text as written. `plain` is false for quoted and block text, which is never a number, a bool or null."""

    place: Place
    text: str
    plain: bool = True

    @property
    def is_null(self) -> bool:
        return self.plain and self.text in ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True, slots=True)
class Sequence:
    place: Place
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Mapping:
    place: Place
    entries: tuple[tuple[Node, Node], ...]
    """Keys and values in the order of the text; keys may repeat and may be any node."""

    def get(self, name: str) -> Node | None:
        return next((value for key, value in self.entries if isinstance(key, Scalar) and key.text == name), None)


Node = Scalar | Sequence | Mapping


def lines_of(text: str) -> tuple[str, ...]:
    return tuple(LINE_BREAK.split(text))


def read(source: Source, text: str, shift: int = 0) -> Node | None:
    """The one document of a text, or None when it is empty. `shift` moves the columns of the first line, for a text
    that stands behind something else in its source. Raises UnreadableError."""
    if bad := NOT_YAML.search(text):
        before = lines_of(text[: bad.start()])
        place = Place(source, len(before) - 1, len(before[-1]) + (shift if len(before) == 1 else 0))
        raise UnreadableError(Problem(place, f"character U+{ord(bad.group()):04X} is not allowed", "remove it"))
    try:
        return _Builder(source, shift).build(yaml.parse(text, Loader=Loader))
    except yaml.YAMLError as error:
        raise UnreadableError(_syntax_problem(error, source, shift)) from None


@dataclass(slots=True)
class _Open:
    """A mapping or list whose end has not come yet."""

    place: Place
    is_mapping: bool
    anchor: str | None
    nodes_before: int
    nodes: list[Node] = field(default_factory=list)


class _Builder:
    """Folds parser events into nodes with a stack of its own, so that deep input ends in an error, not in a crash."""

    def __init__(self, source: Source, shift: int) -> None:
        self.source, self.shift = source, shift
        self.stack: list[_Open] = []
        self.anchors: dict[str, tuple[Node, int]] = {}
        self.nodes = 0
        self.root: Node | None = None

    def build(self, events: Iterator[Any]) -> Node | None:
        for event in events:
            if isinstance(event, yaml.ScalarEvent):
                self.check_tag(event)
                self.scalar(event)
            elif isinstance(event, yaml.CollectionStartEvent):
                self.check_tag(event)
                if len(self.stack) >= MAX_DEPTH:
                    raise self.problem(event, "this is nested too deeply", f"a recipe has at most {MAX_DEPTH} levels")
                is_mapping = isinstance(event, yaml.MappingStartEvent)
                self.stack.append(_Open(self.place(event, 1), is_mapping, event.anchor, self.nodes))
            elif isinstance(event, yaml.CollectionEndEvent):
                self.close()
            elif isinstance(event, yaml.AliasEvent):
                self.alias(event)
            elif isinstance(event, yaml.DocumentStartEvent) and self.root is not None:
                raise self.problem(event, "a second document starts here", "a recipe is one YAML document")
        return self.root

    def scalar(self, event: Any) -> None:
        place, before = self.place(event), self.nodes
        if NOT_TEXT.search(event.value):
            raise UnreadableError(Problem(place, f"{shown(event.value)} holds a control character", "remove it"))
        # Plain text has the style "" in the C parser and None in the Python one.
        self.add(Scalar(place, event.value, not event.style), event.anchor, before)

    def close(self) -> None:
        done = self.stack.pop()
        node: Node
        if done.is_mapping:
            node = Mapping(done.place, _merged(list(zip(done.nodes[::2], done.nodes[1::2], strict=True))))
        else:
            node = Sequence(done.place, tuple(done.nodes))
        self.add(node, done.anchor, done.nodes_before)

    def alias(self, event: Any) -> None:
        if event.anchor not in self.anchors:
            inside = any(event.anchor == each.anchor for each in self.stack)
            close = did_you_mean(event.anchor, self.anchors)
            message = f"'*{event.anchor}' stands inside its '&{event.anchor}'"
            if not inside:
                message = f"no '&{event.anchor}' comes before '*{event.anchor}'"
            raise self.problem(event, message, f"did you mean '*{close}'?" if close else "write the values out here")
        node, size = self.anchors[event.anchor]
        self.nodes += size
        if self.nodes > MAX_NODES:
            raise self.problem(event, f"aliases expand to more than {MAX_NODES} values", "write the values out")
        self.add(node, None, self.nodes)

    def add(self, node: Node, anchor: str | None, nodes_before: int) -> None:
        self.nodes += 1
        if anchor:
            self.anchors[anchor] = (node, self.nodes - nodes_before)
        if self.stack:
            self.stack[-1].nodes.append(node)
        else:
            self.root = node

    def check_tag(self, event: Any) -> None:
        if event.tag not in (None, ""):
            raise self.problem(event, "YAML tags (`!...`) are not supported", "remove the tag: the field has its type")

    def place(self, event: Any, width: int | None = None) -> Place:
        start, end = event.start_mark, event.end_mark
        if width is None:
            line = self.source.lines[start.line] if start.line < len(self.source.lines) else ""
            width = (end.column if end.line == start.line else len(line)) - start.column
        return Place(self.source, start.line, start.column + (0 if start.line else self.shift), max(1, width))

    def problem(self, event: Any, message: str, help_: str) -> UnreadableError:
        return UnreadableError(Problem(self.place(event), message, help_))


def _merged(entries: list[tuple[Node, Node]]) -> tuple[tuple[Node, Node], ...]:
    """Apply merge keys (`<<: *base`, or a list of them): the mapping's own fields win, then the earlier base."""
    own = [(key, value) for key, value in entries if not _is_merge(key)]
    if len(own) == len(entries):
        return tuple(own)
    taken = {key.text for key, _ in own if isinstance(key, Scalar)}
    for key, value in entries:
        if not _is_merge(key):
            continue
        for base in value.items if isinstance(value, Sequence) else (value,):
            if not isinstance(base, Mapping):
                raise UnreadableError(Problem(key.place, "'<<' takes a mapping", "write `<<: *name` with an alias"))
            for inner, inherited in base.entries:
                if isinstance(inner, Scalar) and inner.text not in taken:
                    own.append((inner, inherited))
                    taken.add(inner.text)
    return tuple(own)


def _is_merge(key: Node) -> bool:
    return isinstance(key, Scalar) and key.plain and key.text == "<<"


def _syntax_problem(error: yaml.YAMLError, source: Source, shift: int) -> Problem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    said = str(getattr(error, "problem", None) or error).splitlines()[0]
    context, opened = getattr(error, "context", None), getattr(error, "context_mark", None)
    if context and opened and not source.order and opened.line != (mark.line if mark else 0):
        context += f" that starts on line {opened.line + 1}"
    help_ = next((text for part, text in HELP.items() if part in said), "")
    # An error at the end of the text is shown at its last line that has one.
    line = min(mark.line if mark else 0, len(source.lines) - 1)
    column = mark.column + (0 if line else shift) if mark and mark.line == line else len(source.lines[line])
    while line > 0 and not source.lines[line].strip():
        line -= 1
        column = len(source.lines[line])
    message = f"not YAML: {said}" + (f" ({context})" if context else "")
    return Problem(Place(source, line, column), message, help_)
