"""`enginewright compare`: one table and one report of targets, from what was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.console import stepping
from pipeline.errors import RecipeError, UnavailableError

if TYPE_CHECKING:
    from pipeline.compare.rows import Row


@click.command()
@click.argument("what", nargs=-1, required=True, metavar="RECIPE|ARTIFACT...", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("artifacts"),
    show_default=True,
    help="Of a recipe: where its artifacts are.",
)
@click.option(
    "--bench/--no-bench",
    "measures",
    default=True,
    show_default=True,
    help="Measure those that run here and were not measured yet.",
)
@click.option("--again", is_flag=True, help="Measure all of them, together.")
@click.option("--prompt", type=click.IntRange(1), default=64, show_default=True, help="Tokens of a prompt.")
@click.option("--new", type=click.IntRange(2), default=64, show_default=True, help="Tokens after each prompt.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Of which the median is told.")
@click.option("--html", "page_file", type=click.Path(path_type=Path), help="Write the report to this file as well.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["md", "csv", "json", "html"]),
    default="md",
    show_default=True,
    help="What goes to standard output.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def compare(
    what: Sequence[Path], out: Path, measures: bool, again: bool, prompt: int, new: int, rounds: int,
    page_file: Path | None, form: str, quiet: bool,
) -> None:  # fmt: skip
    """Compare the targets of a RECIPE that was built, or ARTIFACTS in folders: one table, one self-contained report.

    Quality comes from the parity attestations, speed from benchmarks on this machine, what a framework can do from
    cited sources. What has not run here says `deferred`.
    """
    from pipeline.compare import html, text
    from pipeline.compare.rows import columns, of_one_kind, row

    artifacts = _artifacts(what, out)
    if measures:
        _measure(artifacts, again, prompt, new, rounds, quiet)
    parameters = _parameters(artifacts)
    rows: list[Row] = [row(artifact, parameters) for artifact in artifacts]
    table = columns(of_one_kind(rows))
    names = {json.loads((each.artifact / "manifest.json").read_bytes())["name"] for each in rows}
    report = html.page(f"{' and '.join(sorted(names))}: {len(rows)} targets", _machine(), rows, table)
    if page_file:
        page_file.write_text(report, "utf-8")
    shown = {"md": text.markdown, "csv": text.to_csv, "json": text.to_json}
    sys.stdout.write(report if form == "html" else shown[form](rows, table))


def _artifacts(what: Sequence[Path], out: Path) -> list[Path]:
    found: list[Path] = []
    for each in what:
        if each.is_dir():
            found.append(each)
        elif each.suffix in (".yaml", ".yml"):
            found += _of_recipe(each, out)
        else:
            raise RecipeError(
                f"{each} is neither a recipe nor an artifact's folder", hint="give recipe.yaml, or folders"
            )
    if len(found) < 2:
        raise RecipeError("there is nothing to compare with", hint="give two artifacts, or a recipe of several targets")
    return found


def _of_recipe(file: Path, out: Path) -> list[Path]:
    from pipeline.cli.prepare import read

    recipe = read(file)
    found = [out / recipe.name / target for target in recipe.targets]
    if missing := [path.name for path in found if not (path / "manifest.json").is_file()]:
        raise RecipeError(
            f"{file}: not built yet in {out / recipe.name}: {', '.join(missing)}",
            hint=f"build {file} --out {out}, or say --out",
        )
    return found


def _measure(artifacts: Sequence[Path], again: bool, prompt: int, new: int, rounds: int, quiet: bool) -> None:
    """Those that run here, together: figures of one run can be compared. What does not run stays deferred."""
    from pipeline.bench.machine import bandwidth_bytes_s
    from pipeline.bench.run import Case, measure
    from pipeline.cli.bench import checked, document, write

    reports = {}
    for artifact in artifacts:
        try:
            reports[artifact.resolve()] = checked(artifact)
        except UnavailableError as error:
            click.echo(f"{artifact.name}: not measured: {error.message}", err=True)
    if not again and all((path / ".attest" / "bench.json").is_file() for path in reports):
        return
    bandwidth = bandwidth_bytes_s()
    with stepping("bench", quiet=quiet) as progress:
        for found in measure(list(reports), [Case(1, prompt, new)], rounds, progress):
            write(reports[found.artifact], document(found, reports[found.artifact], rounds, bandwidth))


def _parameters(artifacts: Sequence[Path]) -> int | None:
    """Of the model, from the size of its source's weights and their type in config.json. None where they say it not."""
    widths = {"float32": 4, "float16": 2, "bfloat16": 2}
    for artifact in artifacts:
        file = artifact / "config.json"
        config: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        width = widths.get(str(config.get("dtype") or config.get("torch_dtype")))
        sources = json.loads((artifact / "manifest.json").read_bytes())["sources"]
        files = [each for source in sources for each in source["files"] if each["path"].endswith(".safetensors")]
        if width and files:
            return int(sum(each["size"] for each in files)) // width
    return None


def _machine() -> str:
    from pipeline.hardware import probe

    host = probe()
    devices = ", ".join(device.name for device in host.devices) or "no accelerator"
    return f"{host.os} {host.arch}, {host.cores} cores, {host.memory_bytes / 1e9:.0f} GB, {devices}"
