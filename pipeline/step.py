"""Stage and Step: the one abstraction. A stage is a pure function over directories; a step is a stage in a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from pipeline.frozen import frozen
from pipeline.size import SMALL, Need

O = TypeVar("O")  # noqa: E741  the options' type, as design.md names it
Inputs = Mapping[str, Path]
"""An earlier step's role -> its directory, read-only."""

Scope = Literal["portable", "isa", "device"]
"""Which facts of the hardware a result depends on: none, the instruction set, or the exact device."""


class Progress(Protocol):
    """Where a stage says how far it is. `total` of 0 means unknown; units are the stage's own (bytes, samples)."""

    def __call__(self, done: float, total: float = 0, note: str = "") -> None: ...


def silent(done: float, total: float = 0, note: str = "") -> None:
    """A Progress for tests and for callers who do not watch."""


@frozen
class Stage(Generic[O]):
    """A pure function over directories, and what its result depends on.

    `run(inputs, options, out, progress)` reads only `inputs` and `options`, writes only under `out` (which exists and
    is empty), and raises an `EnginewrightError` for what a user can mend. It knows nothing of caching, locking, timing,
    isolation or distribution. It must be a module-level constant, so that a child process can import it by name.
    """

    name: str
    """Field's own name, `openvino.compile`."""
    run: Callable[[Inputs, O, Path, Progress], None]
    version: int = 1
    """Raise it when equal inputs would now give another result."""
    tools: tuple[str, ...] = ()
    """Distributions whose versions enter the key."""
    scope: Scope = "portable"
    toolchain: str = "default"
    """Name of the interpreter that runs it."""
    deterministic: bool = True
    """Whether two runs write the same bytes. Said in the manifest."""
    memory: Need = SMALL
    """What the process will hold at most. Enough, and at most some 2.5 times what it holds: a test compares."""
    resumable: bool = False
    """`out` may hold what an earlier, cut off attempt at the same key left there: whole files, put in place by a
    rename, which the stage takes as done. It removes all else. See docs/decisions/resume.md."""


@frozen
class Step:
    """A stage in a plan: `needs` maps the role under which the stage sees an input to the name of an earlier step."""

    name: str
    stage: Stage[Any]
    options: Any
    needs: Mapping[str, str]
    """Role -> step name."""
