"""A Go template for Ollama, where the model's own chat template is one of a known set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError
from pipeline.stages.gguf.metadata import chat_template
from pipeline.tables import table
from pipeline.text import render_chat

_SYSTEM = {"role": "system", "content": "Answer in one word."}
_TALK = [
    {"role": "user", "content": "What is 2+2? {{ x }}"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And\ntwice that?"},
]
_PROBES: tuple[list[dict[str, str]], ...] = (_TALK[:1], _TALK, [_SYSTEM, *_TALK])
"""Conversations by which templates are compared; the last is left out where a template refuses a system message."""


def templates() -> dict[str, Any]:
    """data/ollama_templates.toml."""
    return table("ollama_templates")


def go_template(model: Path) -> tuple[str, tuple[str, ...]]:
    """(Go template, stop texts) of a model folder. RecipeError that explains why there is none."""
    source = chat_template(model)
    if source is None:
        raise RecipeError("template: go: the model has no chat template", hint="leave `template` out")
    own = [_rendered(model, source, probe) for probe in _PROBES]
    for entry in templates().values():
        other = [_rendered(model, entry["jinja"], probe) for probe in _PROBES]
        pairs = list(zip(own, other, strict=True))
        if all(a == b for a, b in pairs[:2]) and (pairs[2][0] is None or pairs[2][0] == pairs[2][1]):
            return entry["go"], tuple(entry["stop"])
    raise RecipeError(
        "template: go: the model's chat template writes conversations like none of the known ones "
        f"({', '.join(templates())}); it writes {own[1]!r}",
        hint="leave `template` out: Ollama 0.30 and later read the Jinja template inside the file",
    )


def _rendered(model: Path, template: str, messages: list[dict[str, str]]) -> str | None:
    """What a template writes; None where it refuses."""
    try:
        return render_chat(template, model, messages)
    except RecipeError:
        return None
