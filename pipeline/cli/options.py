"""The arguments that `build` and `draft` have in common, each a decorator of click."""

from __future__ import annotations

from pathlib import Path

import click

FOLDER = click.Path(path_type=Path)

recipe = click.argument("recipe", type=FOLDER)
overrides = click.option(
    "--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field of the recipe."
)
offline = click.option("--offline", is_flag=True, help="Use no network; sources must be local or fetched before.")
cache = click.option(
    "--cache", "root", type=FOLDER, help="The store. Default: $ENGINEWRIGHT_CACHE or ~/.cache/enginewright."
)
jobs = click.option(
    "--jobs", "-j", type=click.IntRange(1), help="Steps that run side by side. Default: as many as cores."
)
memory = click.option("--memory", metavar="SIZE", help="Memory for the steps, e.g. 12GB. Default: 90% of what is free.")
form = click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    help="json: one document on standard output.",
)
events = click.option("--events", metavar="FILE", help="Write NDJSON events to FILE (`-`: standard error).")
quiet = click.option("--quiet", "-q", is_flag=True, help="No progress.")
