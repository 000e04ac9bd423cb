"""Targets: one file a backend. Built-ins and plug-ins come through the same door, entry points of one group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from pipeline import installed
from pipeline.engine import Engine
from pipeline.errors import UnavailableError
from pipeline.frozen import frozen
from pipeline.hardware import Hardware, Verdict
from pipeline.pin import Locked
from pipeline.recipe import Recipe, TargetOptions
from pipeline.size import LARGE, Size
from pipeline.step import Step

GROUP = "enginewright.targets"
Kind = Literal["decoder", "seq2seq", "encoder"]


@frozen
class Job:
    """What a target is asked to build: the recipe, where its sources are, and what kind of model it is."""

    recipe: Recipe
    sources: Locked
    task: str
    kind: Kind
    config: Mapping[str, Any]
    """The model's config.json."""
    size: Size

    @property
    def large(self) -> bool:
        """Whether the model, in fp32, is more than a machine should have to hold."""
        return self.kind == "decoder" and self.size.weights > LARGE


@frozen
class Facts:
    """What a target says of its engine for the manifest, beside what engine.json says."""

    requires: Mapping[str, str]
    """Distribution of the runtime -> lowest version that serves it."""
    layout: str
    entry: str
    command: tuple[str, ...]
    """The command that serves or tries the artifact; `{artifact}` stands for its folder."""
    device: str
    isa: tuple[str, ...]
    exact: Mapping[str, str] = field(default_factory=dict)
    """Distribution of the runtime -> the only version that serves it."""
    compute_capability: tuple[str, ...] = ()
    """Of CUDA devices that run it, as in `8.9`; empty: any."""
    min_driver: str = ""
    """Oldest driver of the device; empty: any."""


class Target(Protocol):
    """A backend: a module with these names."""

    Options: type[TargetOptions]
    """Parsed from the recipe's `targets.<name>`."""
    EXTRA: str
    """The extra of this distribution that installs what the target needs."""

    def why_not(self, kind: str, config: Mapping[str, Any], hardware: Hardware) -> str | None:
        """Why `init` should not propose it for a model and a machine; None when it should.
        Empty: not proposed, and no word about it."""
        ...

    def steps(self, job: Job, name: str, options: Any, hardware: Hardware) -> tuple[Step, ...]:
        """The whole pipeline, top to bottom. The steps called `engine`, `reference` and `parity` are what is packaged.

        Raises RecipeError or UnavailableError for what this backend cannot do, before anything runs.
        """
        ...

    def facts(self, engine: Mapping[str, Any], options: Any, hardware: Hardware) -> Facts:
        """What the manifest says of the runtime; `engine` is engine.json."""
        ...

    def open(self, engine: Path, hardware: Hardware) -> Engine:
        """What the engine step wrote, or an artifact -> something that answers."""
        ...

    def can_run(self, manifest: Mapping[str, Any], hardware: Hardware) -> Verdict:
        """Whether this machine can run an artifact, with the reason."""
        ...


def names() -> list[str]:
    """Every installed backend, by the name that a recipe's `runtime` takes."""
    return sorted(installed.entry_points(GROUP))


def load(name: str) -> Target:
    """The backend of a name; UnavailableError when there is none, or when its module does not import."""
    entry = installed.entry_points(GROUP).get(name)
    if entry is None:
        raise UnavailableError(f"no runtime is called {name!r}", hint=f"installed: {', '.join(names())}")
    try:
        return cast(Target, installed.load(entry))
    except ImportError as error:
        raise UnavailableError(f"the runtime {name!r} does not import: {error}") from error
