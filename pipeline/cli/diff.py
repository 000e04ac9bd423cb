"""`enginewright diff`: what differs between two artifacts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from pipeline.artifact import attest
from pipeline.artifact.manifest import Manifest, artifact_id, freeze, thaw
from pipeline.artifact.read import load
from pipeline.cli import transfer
from pipeline.cli.console import table
from pipeline.errors import RecipeError
from pipeline.frozen import frozen
from pipeline.registry import attestations, places, reference
from pipeline.registry.origin import plain
from pipeline.registry.version import open_version

ABSENT = "-"
Reader = Callable[["Side"], dict[str, Any]]


@frozen
class Side:
    """One of the two."""

    manifest: Manifest
    artifact_id: str
    said: Mapping[str, bytes]


@click.command()
@click.argument("one", metavar="A")
@click.argument("other", metavar="B")
@click.option("--exit-code", is_flag=True, help="Exit with 2 when they differ.")
@transfer.target_name
@transfer.out
@transfer.plain_http
@transfer.form
def diff(one: str, other: str, exit_code: bool, target: str | None, out: Path, plain_http: bool, form: str) -> int:
    """Show what differs between the artifacts A and B: recipe, sources, tools, files, parity, speed.

    Each is a folder or a reference; of a version with several targets, --target says which.
    """
    sides = [_side(text, target, out, plain_http) for text in (one, other)]
    same = sides[0].artifact_id == sides[1].artifact_id
    found = {name: dict(differences(a, b)) for name, a, b in _sections(*sides)}
    found = {name: rows for name, rows in found.items() if rows}
    if form == "json":
        listed = {
            name: [{"what": what, "a": a, "b": b} for what, (a, b) in rows.items()] for name, rows in found.items()
        }
        ids = {"a": sides[0].artifact_id, "b": sides[1].artifact_id}
        click.echo(json.dumps({**ids, "same": same, "differences": listed}, indent=2))
    elif same:
        click.echo(f"the same artifact: {sides[0].artifact_id}")
    if form == "text":
        for name, rows in found.items():
            shown = [(what, short(a), short(b)) for what, (a, b) in rows.items()]
            click.echo(plain_lines(table((name.upper(), "A", "B"), shown)))
    return 2 if exit_code and not same else 0


def plain_lines(text: str) -> str:
    """Lines from outside, with what could steer a terminal replaced."""
    return "\n".join(plain(line) for line in text.split("\n"))


def _side(text: str, target: str | None, out: Path, plain_http: bool) -> Side:
    if not reference.is_reference(text):
        manifest, data = load(Path(text))
        return Side(manifest, artifact_id(data), attestations.of_folder(Path(text)))
    where = reference.parse(text)
    repository = places.reading(where, out, plain_http=plain_http)
    version = open_version(repository, where)
    if target is None and len(version.targets) > 1:
        names = ", ".join(each.manifest.target.name for each in version.targets)
        raise RecipeError(f"{text} has several targets", hint=f"give --target, one of: {names}")
    chosen = version.named(target) if target else version.targets[0]
    said = attestations.fetch(repository, chosen.descriptor.digest, chosen.artifact_id)
    return Side(chosen.manifest, chosen.artifact_id, said)


def _sections(one: Side, other: Side) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Title, and both sides as flat mappings."""
    for title, read in READERS.items():
        yield title, read(one), read(other)


def _fields(*names: str) -> Reader:
    return lambda side: flat({name: thaw(freeze(getattr(side.manifest, name))) for name in names})


def _sources(side: Side) -> dict[str, Any]:
    return {f"{source.name}: {file.path}": file.digest for source in side.manifest.sources for file in source.files}


def _tools(side: Side) -> dict[str, Any]:
    stages = side.manifest.stages
    tools = {f"{stage.id}: {name}": version for stage in stages for name, version in stage.tools.items()}
    return tools | {f"{stage.id}: stage version": f"{stage.stage} {stage.version}" for stage in stages}


def _files(side: Side) -> dict[str, Any]:
    return {file.path: f"{file.digest} {file.size} B" for file in side.manifest.files}


def _metrics(said: Mapping[str, bytes], kind: str) -> dict[str, Any]:
    """The numbers of the attestations of a kind."""
    found: dict[str, Any] = {}
    for name, data in said.items():
        if name.endswith(".json") and attestations.predicate_type(name, data) == kind:
            predicate = json.loads(data)["predicate"]
            wanted = {key: predicate.get(key) for key in ("verdict", "metrics", "inputs") if key in predicate}
            found |= flat({name.removesuffix(".json"): wanted})
    return found


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted path."""
    items: Any = None
    if isinstance(value, Mapping) and value:
        items = value.items()
    elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping | list | tuple):
        items = enumerate(value)
    if items is None:
        return {prefix: list(value) if isinstance(value, tuple) else value}
    found: dict[str, Any] = {}
    for name, item in items:
        found |= flat(item, f"{prefix}.{name}" if prefix else str(name))
    return found


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in sorted({*a, *b}):
        if a.get(name, ABSENT) != b.get(name, ABSENT):
            yield name, (a.get(name, ABSENT), b.get(name, ABSENT))


def short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    head, _, rest = text.partition(" ")
    if head.startswith("sha256:") and len(head) == 71:
        return f"{head[:19]}... {rest}".strip()
    return text if len(text) <= 60 else f"{text[:57]}..."


READERS: dict[str, Reader] = {
    "artifact": _fields(
        *("name", "version", "description", "build_key", "precision", "quantization", "gates", "licenses")
    ),
    "recipe": _fields("recipe"),
    "machine": _fields("target", "runtime", "interface"),
    "sources": _sources,
    "tools": _tools,
    "files": _files,
    "parity": lambda side: _metrics(side.said, attest.PARITY),
    "speed": lambda side: _metrics(side.said, attest.BENCHMARK),
}
"""Section -> what is compared in it, as a flat mapping."""
