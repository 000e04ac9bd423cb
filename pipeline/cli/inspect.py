"""`enginewright inspect`: what an artifact is, read from its manifest and its attestations."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.artifact import attest, card, paths
from pipeline.artifact.manifest import Manifest, artifact_id, freeze, thaw
from pipeline.artifact.read import load
from pipeline.cli import transfer
from pipeline.cli.console import megabytes, table
from pipeline.errors import VerificationError
from pipeline.registry import attestations, places, reference
from pipeline.registry.pack import Unpacked
from pipeline.registry.repository import Repository
from pipeline.registry.version import open_version


@click.command()
@click.argument("where", metavar="PATH|REF")
@transfer.target_name
@transfer.out
@transfer.plain_http
@transfer.form
def inspect(where: str, target: str | None, out: Path, plain_http: bool, form: str) -> None:
    """Show what the artifact in the folder PATH is, or each target of a version. `verify` reads the files."""
    if not reference.is_reference(where):
        path = Path(where)
        manifest, data = load(path)
        identity = artifact_id(data)
        shown = [(str(path), manifest, identity, dict(_statements(path, identity)))]
    else:
        ref = reference.parse(where)
        repository = places.reading(ref, out, plain_http=plain_http)
        version = open_version(repository, ref)
        shown = [
            (
                f"{{artifacts}}/{each.manifest.name}/{each.manifest.target.name}",
                each.manifest,
                each.artifact_id,
                _remote_statements(repository, each),
            )
            for each in ([version.named(target)] if target else version.targets)
        ]
    documents = [
        {"artifact_id": identity, "manifest": freeze(manifest), "attestations": statements}
        for _, manifest, identity, statements in shown
    ]
    if form == "json":
        click.echo(json.dumps(documents[0] if len(documents) == 1 else documents, indent=2, ensure_ascii=True))
        return
    for number, (place, manifest, identity, statements) in enumerate(shown):
        click.echo("\n" * bool(number) + plain("\n".join(_lines(place, manifest, identity, statements))))


def _remote_statements(repository: Repository, target: Unpacked) -> dict[str, dict[str, Any]]:
    """Name -> statement, of those that are not wrapped in an envelope; signed ones say the same."""
    said = attestations.fetch(repository, target.descriptor.digest, target.artifact_id)
    return {name.removesuffix(".json"): json.loads(data) for name, data in said.items() if name.endswith(".json")}


def plain(text: str) -> str:
    """Text whose control characters cannot steer a terminal: what is shown came from outside."""
    return "".join("?" if unicodedata.category(char) in ("Cc", "Cf", "Cs") and char != "\n" else char for char in text)


def size(size_bytes: int) -> str:
    """Bytes as text: `631 B`, `265.8 kB`, `8.4 MB`."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    return f"{size_bytes / 1e3:.1f} kB" if size_bytes < 1e6 else megabytes(size_bytes)


def _statements(path: Path, identity: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name -> statement; one that speaks of another artifact is refused."""
    folder = path / paths.ATTESTATIONS
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        if file.is_symlink():
            raise VerificationError(f"{file} is a symbolic link", hint="run `enginewright verify`")
        if found := attest.read_attestation(path, file.stem, identity):
            yield file.stem, found


def _lines(path: str, manifest: Manifest, identity: str, statements: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    yield f"{manifest.name} {manifest.version} for {manifest.target.name}"
    if manifest.description:
        yield manifest.description
    yield ""
    width = max(len(name) for name, _ in _facts(manifest, identity, path))
    yield from (f"{name.ljust(width)}  {value}" for name, value in _facts(manifest, identity, path))
    yield ""
    rows = [(spec.name, way, spec.dtype, _shape(spec.shape)) for way, specs in _ports(manifest) for spec in specs]
    if rows:
        yield table(("tensor", "", "dtype", "shape"), rows)
        yield ""
    roles = sorted({file.role for file in manifest.files})
    files = [(file.role, file.path, size(file.size)) for r in roles for file in manifest.files if file.role == r]
    yield table(("role", "file", "size"), files)
    for name, statement in statements.items():
        if statement.get("predicateType") == attest.PARITY:
            yield ""
            yield from _parity(name, statement["predicate"], manifest)
    if not any(statement.get("predicateType") == attest.PARITY for statement in statements.values()):
        yield ""
        yield "parity: no attestation; `enginewright verify --run --attest` makes one on the machine it is for"


def _facts(manifest: Manifest, identity: str, path: str) -> list[tuple[str, str]]:
    target, runtime = manifest.target, manifest.runtime
    needs = (f"{name} {card.versions(n.exact, n.min, n.max)}" for name, n in sorted(runtime.requires.items()))
    rows = [
        ("artifact", identity),
        ("build key", manifest.build_key),
        ("size", f"{megabytes(manifest.size_bytes)} in {len(manifest.files)} files"),
        ("task", f"{manifest.interface.task} ({manifest.interface.kind})"),
        ("machine", " ".join((target.os, target.arch, target.device.kind, *target.device.compute_capability))),
        ("needs", " ".join(target.isa)),
        ("memory", megabytes(target.device.min_memory_bytes) if target.device.min_memory_bytes else ""),
        ("runtime", f"{runtime.engine}, layout {runtime.layout}, opens {runtime.entry}"),
        ("packages", ", ".join(needs)),
        ("command", card.command(manifest, path)),
        ("precision", manifest.precision),
        ("quantization", _short(manifest.quantization)),
        ("limits", _short(manifest.interface.limits)),
        *((f"source {source.name}", _source(source.uri, source.revision)) for source in manifest.sources),
        ("licences", ", ".join(manifest.licenses) or "none stated"),
    ]
    return [(name, value) for name, value in rows if value]


def _ports(manifest: Manifest) -> Sequence[tuple[str, Any]]:
    return (("in", manifest.interface.inputs), ("out", manifest.interface.outputs))


def _parity(name: str, predicate: Mapping[str, Any], manifest: Manifest) -> Iterator[str]:
    """Verdict, then a row for each metric that was measured or has a gate."""
    reason = f": {predicate['reason']}" if predicate.get("reason") else ""
    samples = (
        f" on {predicate.get('samples')} {predicate.get('inputs', '')} samples" if predicate.get("samples") else ""
    )
    yield f"{name}: {predicate.get('verdict')}{samples}{reason}"
    metrics = predicate.get("metrics") or {}
    outcomes = {gate: word for word in ("passed", "failed", "warned") for gate in predicate.get(f"{word}Tests") or ()}
    names = [*manifest.gates, *(metric for metric in metrics if metric not in manifest.gates)]
    rows = []
    for metric in names:
        limit = manifest.gates.get(metric, "-") or "off"
        value = metrics.get(metric)
        shown = f"{value:.6g}" if isinstance(value, int | float) else "-"
        outcome = {"warned": "not judged"}.get(outcomes.get(metric, ""), outcomes.get(metric, ""))
        rows.append((metric, shown, limit, outcome))
    if rows:
        yield table(("metric", "value", "gate", ""), rows)


def _short(value: Mapping[str, Any] | None) -> str:
    if not value:
        return ""
    items = thaw(value).items()
    return ", ".join(f"{name} {json.dumps(item) if isinstance(item, dict | list) else item}" for name, item in items)


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _source(uri: str, revision: str | None) -> str:
    return f"{uri} at {revision}" if revision and f"@{revision}" not in uri else uri
