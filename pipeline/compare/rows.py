"""One row an artifact, and where each cell comes from: an attestation, the manifest, a cited source, or nowhere yet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.artifact import attest
from pipeline.artifact.verify import verify
from pipeline.errors import RecipeError
from pipeline.frozen import frozen
from pipeline.tables import table

Origin = Literal["measured", "manifest", "cited", "deferred", "none"]


@frozen
class Cell:
    """A value with its origin. `where` names the attestation, the file or the address that holds it."""

    value: Any
    text: str
    origin: Origin
    where: str = ""


NONE = Cell(None, "-", "none")


@frozen
class Column:
    name: str
    title: str
    best: Literal["high", "low", ""] = ""
    """Which end is the better one."""


IDENTITY = (
    Column("target", "target"), Column("framework", "framework"), Column("version", "version"),
    Column("precision", "precision"),
)  # fmt: skip
QUALITY = {
    "decoder": (Column("kld_mean", "mean KLD, nats", "low"), Column("top1", "top-1", "high"),
                Column("perplexity_ratio", "perplexity ratio", "low")),
    "encoder": (Column("cosine_mean", "mean cosine", "high"), Column("cosine_min", "least cosine", "high"),
                Column("spearman", "Spearman", "high")),
}  # fmt: skip
SPEED = {
    "decoder": (Column("decode_tokens_per_s", "decode, tokens/s", "high"),
                Column("prefill_tokens_per_s", "prefill, tokens/s", "high"),
                Column("first_token_s", "first token, ms", "low"), Column("gap_p99_s", "gap p99, ms", "low")),
    "encoder": (Column("texts_per_s", "texts/s", "high"), Column("latency_s", "latency, ms", "low")),
}  # fmt: skip
COST = (
    Column("size_bytes", "size, MB", "low"), Column("bits", "bits a weight", "low"),
    Column("peak_rss_bytes", "peak memory, MB", "low"), Column("open_s", "load, s", "low"),
)  # fmt: skip
ABILITIES = (
    Column("core", "core"), Column("interface", "interface"), Column("serves", "serves"),
    Column("strategies", "decoding"), Column("machines", "machines"), Column("tensor_parallel", "tensor parallel"),
    Column("multi_node", "many nodes"),
)  # fmt: skip


def columns(kind: str) -> tuple[Column, ...]:
    """The table of a kind of model."""
    which = "encoder" if kind == "encoder" else "decoder"
    return (*IDENTITY, *QUALITY[which], *SPEED[which], *COST, *ABILITIES)


@frozen
class Row:
    """An artifact."""

    artifact: Path
    artifact_id: str
    kind: str
    verdict: str
    """Of its gates: passed, failed or deferred."""
    cells: Mapping[str, Cell]

    @property
    def target(self) -> str:
        return str(self.cells["target"].value)


def row(artifact: Path, parameters: int | None) -> Row:
    """What is known of a whole artifact. `parameters`: how many the model has. VerificationError for a changed one."""
    report = verify(artifact)
    manifest, identity = report.manifest, report.artifact_id
    assert manifest and identity
    engine = json.loads((artifact / "engine.json").read_text("utf-8")) if (artifact / "engine.json").is_file() else {}
    kind = str(engine.get("kind", "decoder"))
    runtime = manifest.runtime.engine
    cells: dict[str, Cell] = dict.fromkeys((column.name for column in columns(kind)), NONE)

    def said(value: Any, text: str = "") -> Cell:
        return Cell(value, text or str(value), "manifest", identity)

    size = sum(file.size for file in manifest.files if file.role in ("weights", "engine", "graph"))
    whole = sum(file.size for file in manifest.files)
    cells |= {
        "target": said(manifest.target.name),
        "precision": said(manifest.precision),
        "version": said(_version(manifest)),
        "size_bytes": said(whole, f"{whole / 1e6:.1f}"),
    }
    if parameters:
        cells["bits"] = said(8 * size / parameters, f"{8 * size / parameters:.2f}")
    cells |= _cited(runtime)
    parity = attest.read_attestation(artifact, "parity", identity)
    verdict = parity["predicate"]["verdict"] if parity else "deferred"
    stand_in = next(
        (found for what in ("checkpoint", "graph")
         if (found := attest.read_attestation(artifact, f"parity-{what}", identity))), None,
    )  # fmt: skip
    cells |= _quality(kind, parity, stand_in)
    cells |= _speed(kind, attest.read_attestation(artifact, "bench", identity))
    return Row(artifact, identity, kind, verdict, cells)


def _version(manifest: Any) -> str:
    """Of the runtime that the engine was built or judged with; else the oldest one that serves it."""
    built = {name: version for stage in manifest.stages for name, version in stage.tools.items()}
    needs = manifest.runtime.requires
    own = sorted(needs, key=lambda name: name != manifest.runtime.engine)  # its own name first
    for name in own:
        need = needs[name]
        if found := need.exact or built.get(name):
            return str(found)
        if need.min:
            return f"{need.min} or later"
    return "-"


def frameworks() -> dict[str, dict[str, str]]:
    """data/frameworks.toml"""
    return table("frameworks")


def _cited(runtime: str) -> dict[str, Cell]:
    told = frameworks().get(runtime)
    if told is None:
        return {"framework": Cell(runtime, runtime, "manifest")}
    where = f"{told['source']} ({told['checked']})" if told["source"] != "run" else f"our tests ({told['checked']})"
    found = {column.name: Cell(told[column.name], told[column.name], "cited", where) for column in ABILITIES}
    return {**found, "framework": Cell(told["title"], told["title"], "cited", where)}


def _quality(kind: str, parity: Any, stand_in: Any) -> dict[str, Cell]:
    """Of the engine; where it has not run here, of what it was made from, and marked as that."""
    names = [column.name for column in QUALITY["encoder" if kind == "encoder" else "decoder"]]
    ran = bool(parity and parity["predicate"]["verdict"] in ("passed", "failed"))
    source, where, mark = (parity, "parity.json", "") if ran else (stand_in, "parity of its weights", "*")
    if not source:
        return {name: Cell(None, "deferred", "deferred") for name in names}
    metrics = source["predicate"]["metrics"]
    return {
        name: Cell(metrics[name], _quality_text(name, metrics[name]) + mark, "measured" if ran else "deferred", where)
        for name in names
        if metrics.get(name) is not None
    }


def _quality_text(name: str, value: float) -> str:
    return f"{value:.2e}" if name == "kld_mean" else f"{value:.4f}"


def _speed(kind: str, bench: Any) -> dict[str, Cell]:
    names = [column.name for column in SPEED["encoder" if kind == "encoder" else "decoder"]]
    if not bench:
        return {name: Cell(None, "deferred", "deferred") for name in (*names, "peak_rss_bytes", "open_s")}
    told = bench["predicate"]
    metrics = told["cases"][0]["metrics"]
    found = {}
    for name in names:
        if name in metrics:
            value = metrics[name]["median"]
            spread = f"{metrics[name]['min']:.4g} to {metrics[name]['max']:.4g}"
            text = f"{1000 * value:.2f}" if name.endswith("_s") and "per_s" not in name else f"{value:.1f}"
            found[name] = Cell(value, text, "measured", f"bench.json, {told['rounds']} rounds: {spread}")
    rss, open_s = told["peak_rss_bytes"], told["open_s"]
    return {
        **found,
        "peak_rss_bytes": Cell(rss, f"{rss / 1e6:.0f}", "measured", "bench.json"),
        "open_s": Cell(open_s, f"{open_s:.2f}", "measured", "bench.json"),
    }


def of_one_kind(rows: Sequence[Row]) -> str:
    """The kind of all rows. RecipeError where they have nothing to compare."""
    kinds = {each.kind for each in rows}
    if len(kinds) != 1:
        raise RecipeError(
            f"these artifacts answer different questions: {', '.join(sorted(kinds))}", hint="compare one kind at a time"
        )
    return kinds.pop()


def front(rows: Sequence[Row], cost: str, gain: str, *, low_cost: bool, low_gain: bool) -> list[Row]:
    """The rows that no other one beats in both: the Pareto front, in the order of `cost`."""

    def place(each: Row) -> tuple[float, float]:
        a, b = each.cells[cost].value, each.cells[gain].value
        return (a if low_cost else -a, b if low_gain else -b)

    known = [each for each in rows if None not in (each.cells[cost].value, each.cells[gain].value)]
    found = [
        each for each in known
        if not any(
            all(x <= y for x, y in zip(place(other), place(each), strict=True)) and place(other) != place(each)
            for other in known
        )
    ]  # fmt: skip
    return sorted(found, key=place)
