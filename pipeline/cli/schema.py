"""`enginewright schema`: the JSON schema of recipes, for editors."""

from __future__ import annotations

import json

import click


@click.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors.

    \b
    enginewright schema > recipe.schema.json
    and as the first line of a recipe, for editors with the YAML language server:
    # yaml-language-server: $schema=recipe.schema.json
    """
    from pipeline import targets
    from pipeline.schema import recipe_schema

    runtimes = {name: targets.load(name).Options for name in targets.names()}
    click.echo(json.dumps(recipe_schema(runtimes), indent=2, ensure_ascii=False))
