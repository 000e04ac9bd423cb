"""What is wrong with a recipe and where, in the words and the shape that its author reads."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

from pipeline.errors import RecipeError

SHOWN = 100
"""How many problems are printed; the rest is counted."""
LINE_WIDTH = 110
"""How much of a source line is printed, in characters."""


@dataclass(frozen=True, slots=True)
class Source:
    """A text that nodes come from: the recipe, or one `--set`."""

    name: str
    lines: tuple[str, ...]
    order: int = 0
    """0 for the recipe, and from 1 for the overrides in the order in which they were given."""


class Place(NamedTuple):
    """Where something stands: line and column count from 0, width is in characters."""

    source: Source
    line: int = 0
    column: int = 0
    width: int = 1


class Problem(NamedTuple):
    """One thing to mend: what is wrong at a place, and the next action in `help`."""

    place: Place
    message: str
    help: str = ""

    def render(self) -> str:
        """`file:line:column: message`, the source line, a caret, and the help beside the caret."""
        source, line, column, _ = self.place
        at = source.name if source.order else f"{source.name}:{line + 1}:{column + 1}"
        head = f"{at}: {self.message}"
        if line >= len(source.lines):
            return f"{head}\n    = {self.help}" if self.help else head
        number = "" if source.order else str(line + 1)
        text, caret = _excerpt(source.lines[line], column, self.place.width)
        help_ = f" {self.help}" if self.help else ""
        return f"{head}\n{number:>5} | {text}\n{'':>5} | {caret}{help_}"


class UnreadableError(Exception):
    """Raised where reading cannot go on: the text is not YAML, or not a safe kind of it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def error_of(name: str, problems: Sequence[Problem]) -> RecipeError:
    """All problems as one error, in the order in which the recipe is read, overrides last.

    What an alias repeats in several sections is one problem to mend: it is said once.
    """
    problems = list({(problem.place, problem.help): problem for problem in reversed(problems)}.values())[::-1]
    ordered = sorted(problems, key=lambda p: (p.place.source.order, p.place.line, p.place.column))
    blocks = [problem.render() for problem in ordered[:SHOWN]]
    if len(problems) > SHOWN:
        blocks.append(f"... and {len(problems) - SHOWN} more")
    if len(problems) > 1:
        blocks.insert(0, f"{name} has {len(problems)} errors")
    return RecipeError("\n".join(blocks))


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The choice that `word` was probably meant to be, or ""."""
    known = {choice.lower().replace("-", "_"): choice for choice in choices}
    # difflib is quadratic in the length: a megabyte of text is no typo of anything.
    close = get_close_matches(word.lower().replace("-", "_"), known, n=1, cutoff=0.6) if len(word) <= 80 else []
    return known[close[0]] if close else ""


def suggest(word: str, choices: Sequence[str], label: str = "choose") -> str:
    """Help for a word that is not among `choices`: the likely one, else all of them."""
    close = did_you_mean(word, choices)
    return f"did you mean {close!r}?" if close else f"{label}: {', '.join(choices)}"


def shown(text: str) -> str:
    """A value in a message: quoted, escaped, and never longer than a glance."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _excerpt(line: str, column: int, width: int) -> tuple[str, str]:
    """The part of a line that can be shown, and the carets that fall below it on a terminal."""
    start = max(0, column - LINE_WIDTH // 2) if len(line) > LINE_WIDTH else 0
    text = "".join(char if char.isprintable() else " " for char in line[start : start + LINE_WIDTH])
    column -= start
    cells = sum(_cells(char) for char in text[:column]) + max(0, column - len(text))
    marked = sum(_cells(char) for char in text[column : column + width])
    return text.rstrip(), " " * cells + "^" * max(1, marked)


def _cells(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
