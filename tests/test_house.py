"""The house rules that machines can keep: imports go downward, heavy ones are lazy, docs name everything."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from pipeline import targets
from pipeline.cli.main import VERBS, cli
from pipeline.plain import Option, members, options_of
from pipeline.recipe import Recipe, TargetOptions
from pipeline.step import Stage
from tests.conftest import ROOT

PACKAGE = ROOT / "pipeline"
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "numpy", "huggingface_hub"}
HEAVY |= {"openvino", "openvino_genai", "openvino_tokenizers", "nncf"}
HEAVY |= {"urllib3", "cryptography", "fsspec"}

# Lower may not import higher. Modules of one row may import each other.
FLOORS = [
    {"errors", "frozen", "installed", "size", "tables"},
    {"step", "recipe", "plain", "digest"},
    {"engine", "hardware", "source", "places"},
    {"hub", "parity", "decoding", "lock", "text"},
    {"stages"},
    {"pin"},
    {"targets"},
    {"parse", "plan", "store", "schema"},
    {"run"},
    {"artifact"},
    {"trust"},
    {"registry"},
    {"shared"},
    {"serve"},
    {"bench"},
    {"compare"},
    {"cli"},
]
CORE = ("step.py", "plan.py", "store.py", "run/local.py", "run/worker.py")


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, path


def floor(module: str) -> int:
    parts = module.split(".")
    if len(parts) == 1 or not ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists()):
        return 0  # the package itself, or a name in it
    found = [index for index, names in enumerate(FLOORS) if parts[1] in names]
    assert found, f"{module} has no place in the house: add it to FLOORS"
    return found[0]


@functools.cache
def imported(path: Path) -> tuple[str, ...]:
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_downward() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, path in modules()
        for other in imported(path)
        if other.startswith("pipeline.") and floor(other) > floor(name)
    ]
    assert not wrong


def test_the_core_is_small() -> None:
    lines = 0
    for name in CORE:
        tree = ast.parse((PACKAGE / name).read_text("utf-8"))
        lines += len({line for node in ast.walk(tree) if isinstance(node, ast.stmt) for line in spans(node)})
    assert lines < 400, f"the core has {lines} lines of code"


def spans(node: ast.stmt) -> range:
    """The lines of a statement without those of the statements in its block. Docstrings are not code."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return range(0)
    body = getattr(node, "body", None)
    end = body[0].lineno - 1 if body else node.end_lineno or node.lineno
    return range(node.lineno, max(end, node.lineno) + 1)


def run_and_list_modules(code: str, **env: str) -> set[str]:
    code += "\nimport sys, json; sys.stderr.write('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **env}, cwd=ROOT
    )
    return {name.partition(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


@pytest.mark.parametrize("verb", ["--help", "--version", *(f"{verb} --help" for verb in VERBS)])
def test_help_imports_nothing_heavy(verb: str) -> None:
    loaded = run_and_list_modules(f"from pipeline.cli.main import run; run({verb.split()!r})")
    assert not loaded & HEAVY


def test_planning_imports_nothing_heavy() -> None:
    assert (
        not run_and_list_modules(
            "from pipeline.cli.main import run\n"
            "assert run(['build', 'recipes/tiny-llama.yaml', '--plan']) == 0\n"
            "assert run(['build', 'recipes/minilm.yaml', '--plan']) == 0\n"
            "assert run(['build', 'recipes/openvino.yaml', '--plan']) == 0\n"
            "assert run(['build', 'recipes/openvino-minilm.yaml', '--plan']) == 0"
        )
        & HEAVY
    )


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for each in command.list_commands(context):
            inner = command.get_command(context, each)
            assert inner is not None
            yield from commands(inner, f"{name} {each}")


def test_every_command_and_option_is_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text("utf-8")
    for name, command in commands(cli, "enginewright"):
        assert name in text, f"docs/cli.md lacks {name}"
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts[0]} has no help"
                assert parameter.opts[0] in text, f"docs/cli.md lacks {parameter.opts[0]} of {name}"


def recipe_fields(cls: type) -> Iterator[tuple[str, Option]]:
    """Every field of a section and of the sections in it: where it is declared, and the field."""
    for field in options_of(cls):
        yield f"{cls.__name__}.{field.name}", field
        for inner in members(field.type):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                yield from recipe_fields(inner)


def all_fields() -> list[tuple[str, Option]]:
    classes = [Recipe, TargetOptions, *(targets.load(name).Options for name in targets.names())]
    return [found for cls in classes for found in recipe_fields(cls)]


def test_every_recipe_field_is_documented() -> None:
    text = (ROOT / "docs" / "recipe.md").read_text("utf-8")
    for where, field in all_fields():
        assert field.metadata.get("doc"), f"{where} has no doc"
        assert f"`{field.name}`" in text, f"docs/recipe.md lacks {where}"


def test_every_example_is_yaml() -> None:
    """`init` writes examples as comments, and people take the `#` away."""
    for where, field in all_fields():
        try:
            yaml.safe_load(f"{field.name}: {field.metadata.get('example', '')}")
        except yaml.YAMLError as error:
            raise AssertionError(f"{where}: {error}") from error


def test_every_target_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert [name for name in targets.names() if name != "copy" and f"`{name}`" not in text] == []


@functools.cache
def parts() -> dict[str, Path]:
    return {name: path for name, path in modules() if name.startswith(MADE_OF)}


def sources(module: str, seen: dict[str, Path]) -> dict[str, Path]:
    """The module and all it imports of what stages are made of, also inside functions."""
    paths = parts()
    if module in paths and module not in seen:
        seen[module] = paths[module]
        for other in imported(paths[module]):
            sources(other if other in paths else other.rpartition(".")[0], seen)
    return seen


MADE_OF = ("pipeline.stages.", "pipeline.parity.", "pipeline.decoding", "pipeline.targets.", "pipeline.hub.")


def stages() -> dict[str, str]:
    """Stage name and version -> digest of the sources that it is made of."""
    found = {}
    for name, _ in modules():
        if name.startswith(("pipeline.stages.", "pipeline.targets.")):
            for value in vars(importlib.import_module(name)).values():
                if isinstance(value, Stage) and value.run.__module__ == name:
                    made_of = sources(name, {})
                    text = b"".join(made_of[each].read_bytes() for each in sorted(made_of))
                    found[f"{value.name} {value.version}"] = hashlib.sha256(text).hexdigest()[:16]
    return found


def test_a_changed_stage_is_a_decision() -> None:
    """Raise the stage's version, or record that its results are the same: ENGINEWRIGHT_REGENERATE=1."""
    lock = ROOT / "tests" / "golden" / "stages.lock"
    if os.environ.get("ENGINEWRIGHT_REGENERATE"):
        lock.write_text(json.dumps(stages(), indent=1, sort_keys=True) + "\n", "utf-8")
    assert stages() == json.loads(lock.read_text("utf-8"))


def test_the_top_level_is_the_one_that_was_fixed() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    top = {line.split("/")[0] for line in listed.splitlines()}
    assert {"pyproject.toml", "pipeline", "recipes", "artifacts", "tests", "ci", "Dockerfile"} <= top
    assert top <= {
        *("pyproject.toml", "pipeline", "recipes", "artifacts", "tests", "ci", "Dockerfile", "README.md", "LICENSE"),
        *("CHANGELOG.md", "Makefile", ".ci", ".gitignore", "bench", "docs"),
    }
