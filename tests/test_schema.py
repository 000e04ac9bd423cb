"""The JSON schema of recipes, judged by the jsonschema library."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from pipeline import targets
from pipeline.errors import RecipeError
from pipeline.plain import to_plain
from pipeline.schema import recipe_schema
from tests.recipes import MINIMAL, Options, folder, load

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "errors"
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))

# What a schema cannot see: the text itself, and files, hardware and metrics that exist or not.
UNSEEN = {
    "alias_unknown",
    "bell",
    "bomb",
    "control_character",
    "keys_that_are_no_text",
    "nested",
    "tag",
    "two_documents",
}
UNSEEN |= {"alias_of_itself", "merge_of_text", "duplicate_keys", "overrides", "hardware_and_gates", "across_fields"}
UNSEEN |= {file.stem for file in (*GOLDEN.glob("syntax_*.yaml"), *GOLDEN.glob("model_*.yaml"))} | {"paths"}


def as_data(text: str) -> Any:
    return yaml.safe_load(text)


JUDGE = Draft202012Validator(recipe_schema({"copy": Options, "onnxruntime": Options}))


def problems(recipe: Any, judge: Draft202012Validator = JUDGE) -> list[str]:
    """Where a recipe does not fit the schema; short, because a failing test prints it."""
    return ["$" + "".join(f".{part}" for part in error.absolute_path) for error in judge.iter_errors(recipe)]


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(JUDGE.schema)


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda file: file.name)
def test_shipped_recipes_fit_the_printed_schema(recipe: Path) -> None:
    from pipeline.cli.main import cli

    printed = CliRunner().invoke(cli, ["schema"], catch_exceptions=False)
    schema = json.loads(printed.stdout)
    Draft202012Validator.check_schema(schema)
    assert problems(as_data(recipe.read_text(encoding="utf-8")), Draft202012Validator(schema)) == []


def test_there_are_shipped_recipes() -> None:
    assert SHIPPED and "copy" in targets.names()


@pytest.mark.parametrize("name", sorted({file.stem for file in GOLDEN.glob("*.yaml")} - UNSEEN))
def test_broken_recipes_do_not_fit(name: str) -> None:
    file = GOLDEN / f"{name}.yaml"
    assert problems(as_data(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"names": "x"}, "$"),
        ({"name": "Has Spaces"}, "$.name"),
        ({"model": {}}, "$.model"),
        ({"model": {"source": "a", "task": "dance"}}, "$.model.task"),
        ({"targets": {}}, "$.targets"),
        ({"targets": {"CPU": {"runtime": "copy"}}}, "$.targets"),
        ({"targets": {"cpu": {}}}, "$.targets.cpu"),
        ({"targets": {"cpu": {"runtime": "tflite"}}}, "$.targets.cpu"),
        ({"targets": {"cpu": {"runtime": "copy", "quantize": {"group_size": 8}}}}, "$.targets.cpu"),
        ({"package": {"golden": 17}}, "$.package.golden"),
        ({"package": {"golden": 1.5}}, "$.package.golden"),
        ({"parity": {"seed": -1}}, "$.parity.seed"),
    ],
)
def test_the_place_of_what_is_wrong(change: dict[str, Any], path: str) -> None:
    good = as_data(MINIMAL)
    assert problems(good) == []
    assert problems(good | change) == [path]


PARTS: tuple[Any, ...] = (
    None,
    True,
    0,
    1,
    4,
    16,
    64,
    300,
    0.5,
    1.0,
    -1,
    "a",
    "",
    "copy",
    "auto",
    "int8",
    "fp32",
    "rtn",
)
PARTS += (
    {},
    ["a"],
    [1, 2],
    [1],
    {"kld_mean": 1},
    {"kld_mean": None},
    {"top1": "x"},
    {"a": "b"},
    "data/heldout.txt",
    [],
)
VALUES = st.sampled_from(PARTS)
FIELDS = [*(f"targets.cpu.{option}" for option in Options.__dataclass_fields__), "name", "version", "model.task"]
FIELDS += [f"targets.cpu.quantize.{name}" for name in ("method", "bits", "group_size", "symmetric", "damping", "x")]
FIELDS += ["model.license", "parity.seed", "parity.data", "package.golden", "package", "toolchains", "calibration.path"]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
def test_an_editor_accepts_what_the_parser_accepts(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    recipe = as_data(MINIMAL)
    for path, value in changes.items():
        # The one difference: text written as `true` is text to the parser, and no editor should offer it.
        assume(value is not True or path.endswith("symmetric"))
        *sections, last = path.split(".")
        inner = recipe
        for section in sections:
            if not isinstance(inner.get(section), dict):
                inner[section] = {}
            inner = inner[section]
        inner[last] = copy.deepcopy(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder(tmp_path_factory.mktemp("recipe")))
        try:
            load(json.dumps(recipe))
        except RecipeError:
            return
    assert problems(recipe) == []


def test_every_field_says_what_it_is() -> None:
    sections = [JUDGE.schema, *JUDGE.schema["$defs"].values()]
    for section in sections:
        assert section["description"]
        for name, field in section["properties"].items():
            assert field["description"], name
    assert JUDGE.schema["$defs"]["recipe.Parity"]["properties"]["new_tokens"] == {
        "type": "integer",
        "minimum": 1,
        "description": "How far each prompt is continued. In tokens.",
        "default": 32,
    }
    assert JUDGE.schema["properties"]["parity"]["default"] == to_plain(load_default("parity"))


def load_default(name: str) -> Any:
    from pipeline.plain import options_of
    from pipeline.recipe import Recipe

    return next(option.default() for option in options_of(Recipe) if option.name == name)
