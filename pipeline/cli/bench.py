"""`enginewright bench`: how fast artifacts are on this machine, beside each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.console import megabytes, stepping, table
from pipeline.errors import RecipeError, StageError, UnavailableError

if TYPE_CHECKING:
    from pipeline.artifact.verify import Report
    from pipeline.bench.run import Measured


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers like 1,4", context, parameter) from None
    if min(found) < 1:
        raise click.BadParameter("each is at least 1", context, parameter)
    return found


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--batch", default="1", show_default=True, callback=_numbers, help="Sizes of the batch, as in 1,4.")
@click.option("--prompt", default="64", show_default=True, callback=_numbers, help="Tokens of a prompt, as in 32,512.")
@click.option("--new", type=click.IntRange(1), default=64, show_default=True, help="Tokens after each prompt.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Of which the median is told.")
@click.option("--serve", "through_server", is_flag=True, help="Measure through HTTP as well, with --streams at once.")
@click.option("--streams", type=click.IntRange(1), default=8, show_default=True, help="With --serve: streams at once.")
@click.option(
    "--attest/--no-attest", default=True, show_default=True, help="Write .attest/bench.json of each artifact."
)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", help="json: one document.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def bench(
    artifacts: Sequence[Path], batch: tuple[int, ...], prompt: tuple[int, ...], new: int, rounds: int,
    through_server: bool, streams: int, attest: bool, form: str, quiet: bool,
) -> None:  # fmt: skip
    """Measure the ARTIFACTS in folders: time to the first token, prefill and decode speed, gaps, memory, load time.

    Each runs in a process of its own, and they take turns, so that what disturbs the machine disturbs them alike. The
    memory's roofline stands beside the decode speed: a token reads every weight once.
    """
    from pipeline.bench.machine import bandwidth_bytes_s
    from pipeline.bench.run import Case, measure

    reports = [checked(artifact) for artifact in artifacts]
    cases = [Case(b, p, new) for b in batch for p in prompt]
    bandwidth = bandwidth_bytes_s()
    with stepping("bench", quiet=quiet) as progress:
        found = measure([artifact.resolve() for artifact in artifacts], cases, rounds, progress)
    told = [document(each, report, rounds, bandwidth) for each, report in zip(found, reports, strict=True)]
    if through_server:
        for each, one in zip(told, found, strict=True):
            if one.kind == "decoder":
                each["http"] = _through_http(one.artifact, streams, prompt[0], new, rounds)
    if attest:
        for report, each in zip(reports, told, strict=True):
            write(report, each)
    if form == "json":
        click.echo(json.dumps({"bandwidth_bytes_per_s": bandwidth, "artifacts": told}, indent=1))
    else:
        click.echo(_table(told))
        click.echo(f"memory: {bandwidth / 1e9:.1f} GB/s; medians of {rounds} rounds in turn")


def checked(artifact: Path) -> Report:
    """The report of a whole artifact that this machine can run. Raises what is wrong with it."""
    from pipeline import hardware, targets
    from pipeline.artifact.verify import verify

    report = verify(artifact)
    assert report.manifest
    if not (artifact / "engine.json").is_file():
        raise RecipeError(f"{artifact} has no engine that can be opened", hint="it is of a target for tests")
    manifest = json.loads((artifact / "manifest.json").read_bytes())
    verdict = targets.load(report.manifest.runtime.engine).can_run(manifest, hardware.probe())
    if not verdict.ok:
        raise UnavailableError(f"this machine cannot run {artifact}: {verdict.reason}", hint="measure it where it runs")
    return report


def document(found: Measured, report: Report, rounds: int, bandwidth: float) -> dict[str, Any]:
    """What was measured of an artifact, as the attestation says it."""
    from pipeline import hardware
    from pipeline.plain import to_plain

    assert report.manifest
    weights = sum(file.size for file in report.manifest.files if file.role in ("weights", "engine", "graph"))
    return {
        "name": report.manifest.name, "target": found.artifact.name, "artifact_id": report.artifact_id,
        "kind": found.kind, "open_s": found.open_s, "peak_rss_bytes": found.peak_rss_bytes, "weights_bytes": weights,
        "rounds": rounds, "cases": found.summary(), "bandwidth_bytes_per_s": bandwidth,
        "roofline_tokens_per_s": bandwidth / weights if weights else None, "host": to_plain(hardware.probe()),
    }  # fmt: skip


def write(report: Report, told: dict[str, Any]) -> None:
    """The attestation `.attest/bench.json`. StageError where it cannot be written."""
    from pipeline.artifact import attest

    assert report.manifest and report.artifact_id
    said = attest.statement(attest.BENCHMARK, report.artifact_id, told, name=report.manifest.name)
    try:
        attest.write_attestation(report.path, "bench", said)
    except OSError as error:
        raise StageError(
            f"the attestation cannot be written: {error.filename}: {error.strerror}", hint="or run with --no-attest"
        ) from error


def _through_http(artifact: Path, streams: int, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    from pipeline.bench.http import Load, serving, through_http

    with serving(artifact) as address:
        return through_http(address, Load(streams, streams * max(2, rounds), prompt, new))


def _table(told: Sequence[dict[str, Any]]) -> str:
    rows = []
    for each in told:
        for case in each["cases"]:
            metrics = {name: value["median"] for name, value in case["metrics"].items()}
            speed = metrics.get("decode_tokens_per_s")
            roof = each["roofline_tokens_per_s"]
            texts = metrics.get("texts_per_s")
            rows.append([
                each["target"], case["batch"], case["prompt"],
                _number(metrics.get("prefill_tokens_per_s", texts)), _number(speed),
                f"{100 * speed / roof:.0f} %" if speed and roof and case["batch"] == 1 else "-",
                _ms(metrics.get("first_token_s", metrics.get("latency_s"))), _ms(metrics.get("gap_p50_s")),
                _ms(metrics.get("gap_p99_s")), f"{each['open_s']:.2f}", megabytes(each["peak_rss_bytes"]),
                _number(each["http"]["tokens_per_s"]) if "http" in each else "-",
            ])  # fmt: skip
    header = (
        "TARGET", "BATCH", "PROMPT", "PREFILL/S", "DECODE/S", "ROOFLINE", "FIRST MS", "P50 MS", "P99 MS", "OPEN S",
        "RSS", "HTTP/S",
    )  # fmt: skip
    return table(header, rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.2f}"
