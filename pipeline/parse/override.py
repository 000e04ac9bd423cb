"""`--set targets.cpu.quantize.group_size=64`: one-off changes, made on the nodes before they get types."""

from __future__ import annotations

from pipeline.parse import document
from pipeline.parse.document import MAX_DEPTH, Node, Scalar
from pipeline.parse.problems import Place, Problem, Source, UnreadableError

PREFIX = "--set "


def apply(root: Node | None, override: str, order: int) -> Node:
    """The tree with one value set, made by copying the path to it: what an alias shares elsewhere stays as it was.

    Missing mappings on the way are created. `order` counts the overrides from 1. Raises UnreadableError.
    """
    # An argument that is not UTF-8 comes with lone surrogates; they have no place in a tree of text.
    override = override.encode("utf-8", "replace").decode("utf-8")
    source = Source("--set", document.lines_of(PREFIX + override), order)
    path, equals, text = override.partition("=")
    if not equals:
        place = Place(source, 0, len(PREFIX), len(override))
        raise UnreadableError(Problem(place, "an override needs a value", "write --set path.to.field=value"))
    start = len(PREFIX)
    steps: list[Scalar] = []
    for name in path.split("."):
        place = Place(source, 0, start, max(1, len(name)))
        if not name.strip():
            raise UnreadableError(Problem(place, "a name is missing", "write --set path.to.field=value"))
        steps.append(Scalar(place, name.strip()))
        start += len(name) + 1
    if len(steps) > MAX_DEPTH:
        raise UnreadableError(Problem(steps[0].place, "this is nested too deeply"))
    value = document.read(source, text, shift=start)
    if value is None:
        value = Scalar(Place(source, 0, start), "")
    return _assign(root, steps, value)


def _assign(node: Node | None, steps: list[Scalar], value: Node) -> Node:
    if not steps:
        return value
    if node is None or (isinstance(node, Scalar) and node.is_null):
        node = document.Mapping(steps[0].place, ())
    if not isinstance(node, document.Mapping):
        kind = "is a list: set it as a whole" if isinstance(node, document.Sequence) else "has no fields"
        raise UnreadableError(Problem(steps[0].place, f"what stands before '{steps[0].text}' {kind}"))
    key, rest = _longest_key(node, steps)
    entries, found = [], False
    for old_key, old in node.entries:
        same = isinstance(old_key, Scalar) and old_key.text == key.text
        if same and not rest:
            old_key = key  # a problem with the new value is the override's, not the line's
        entries.append((old_key, _assign(old, rest, value) if same else old))
        found = found or same
    if not found:
        entries.append((key, _assign(None, rest, value)))
    return document.Mapping(node.place, tuple(entries))


def _longest_key(node: document.Mapping, steps: list[Scalar]) -> tuple[Scalar, list[Scalar]]:
    """The next key, and what is left of the path. A target's name may hold dots: the longest key that exists wins."""
    for count in range(len(steps), 1, -1):
        name = ".".join(step.text for step in steps[:count])
        if node.get(name) is not None:
            first, last = steps[0].place, steps[count - 1].place
            place = first._replace(width=last.column + last.width - first.column)
            return Scalar(place, name), steps[count:]
    return steps[0], steps[1:]
