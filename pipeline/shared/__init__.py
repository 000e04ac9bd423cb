"""The shared store: results that builders on several machines have in common, behind the store of each."""

from __future__ import annotations

from pipeline.shared.places import opened
from pipeline.shared.record import Record
from pipeline.shared.shared import Shared

__all__ = ["Record", "Shared", "open_shared"]


def open_shared(url: str, *, read_only: bool = False) -> Shared:
    """The shared store at a URL. RecipeError for what is none, UnavailableError without the library that it needs."""
    return Shared(opened(url), url, read_only=read_only)
