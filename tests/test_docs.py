"""The generated pages of docs/ are those that the code would write now."""

from __future__ import annotations

import dataclasses
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import targets
from pipeline.cli.main import VERBS
from pipeline.plain import options_of
from pipeline.recipe import Recipe

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def generator() -> dict[str, object]:
    return runpy.run_path(str(DOCS / "generate.py"))


def test_pages_are_up_to_date() -> None:
    """In a process of its own: click keeps a command's help option as the first caller had it."""
    done = subprocess.run(
        [sys.executable, DOCS / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_check_names_a_page_that_is_out_of_date(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], generator: dict[str, object]
) -> None:
    main = generator["main"]
    main.__globals__["DOCS"] = tmp_path  # type: ignore[attr-defined]
    try:
        assert main(check=True) == 1  # type: ignore[operator]
        assert "docs/recipe.md, docs/cli.md" in capsys.readouterr().out
        assert main(check=False) == 0 and main(check=True) == 0  # type: ignore[operator]
        (tmp_path / "cli.md").write_text("old")
        assert main(check=True) == 1  # type: ignore[operator]
    finally:
        main.__globals__["DOCS"] = DOCS  # type: ignore[attr-defined]


def test_every_field_and_its_doc_are_in_the_reference(generator: dict[str, object]) -> None:
    text = (DOCS / "recipe.md").read_text(encoding="utf-8")
    sections = generator["sections"]
    classes = {Recipe, *(cls for _, cls in sections(Recipe))}  # type: ignore[operator]
    for runtime in targets.names():
        options = targets.load(runtime).Options
        classes |= {options, *(cls for _, cls in sections(options))}  # type: ignore[operator]
    for cls in classes:
        assert dataclasses.is_dataclass(cls)
        for option in options_of(cls):
            doc = option.metadata.get("doc", "")
            assert doc, f"{cls.__name__}.{option.name} has no doc"
            assert re.search(
                rf"^\| `{option.name}` \|.*{re.escape(doc.replace('|', chr(92) + '|'))}", text, re.MULTILINE
            )


def test_every_command_is_in_the_reference() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    for verb in VERBS:
        assert f"## `enginewright {verb}`\n" in text
