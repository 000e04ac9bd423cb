"""From a recipe file to a plan: what `build`, `doctor` and every later verb that reads a recipe start with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from pipeline import hardware as machines
from pipeline import targets
from pipeline.errors import RecipeError, UnavailableError
from pipeline.frozen import frozen
from pipeline.hardware import Hardware
from pipeline.parity import gates
from pipeline.parse import load_recipe
from pipeline.pin import pin
from pipeline.plan import Plan, plan
from pipeline.recipe import Recipe
from pipeline.run import toolchain
from pipeline.size import size_of
from pipeline.stages.tasks import kind_of, task_of
from pipeline.store import Store
from pipeline.targets import Job, Kind
from pipeline.targets.pruning import with_pruning

NAME_LENGTH = 100
"""Of a recipe or a target; file systems take 255, and beside an artifact lie folders with a longer name."""


@frozen
class Prepared:
    """Everything that is known before anything runs."""

    path: Path
    job: Job
    plan: Plan
    hardware: dict[str, Hardware]
    """By target."""

    @property
    def recipe(self) -> Recipe:
        """The typed recipe, with only the targets that were asked for."""
        return self.job.recipe


def read(path: Path, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> Recipe:
    """The typed recipe; `only` names the targets to keep."""
    recipe = load_recipe(
        path,
        lambda runtime: targets.load(runtime).Options,
        targets.names(),
        overrides,
        hardware=machines.names(),
        metrics=tuple(name for name, metric in gates.metrics().items() if metric.direction),
    )
    for what, name in (("name", recipe.name), *(("a target", name) for name in recipe.targets)):
        if len(name) > NAME_LENGTH:
            raise RecipeError(
                f"{path}: {what} has {len(name)} characters: {name[:NAME_LENGTH]}...",
                hint=f"a name becomes a folder: {NAME_LENGTH} characters at most",
            )
    if unknown := [name for name in only if name not in recipe.targets]:
        raise RecipeError(f"{path} has no target {unknown[0]!r}", hint=f"its targets: {', '.join(recipe.targets)}")
    return replace(recipe, targets={name: t for name, t in recipe.targets.items() if not only or name in only})


def prepare(
    path: Path,
    store: Store,
    *,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    locked: bool = False,
    offline: bool = False,
    update: bool = False,
    write_lock: bool = False,
) -> Prepared:
    """Read, pin and plan. Raises before anything runs for whatever can be known before anything runs."""
    recipe = read(path, overrides, only)
    # A one-off source must not cost the recipe its pin.
    write = write_lock and not any(each.startswith(("model", "calibration", "parity")) for each in overrides)
    sources = pin(recipe, path, locked=locked, offline=offline, update=update, write=write, cache=store.root)
    names = [file.path for file in sources.model.files]
    task = recipe.model.task or task_of(sources.config, names, recipe.model.source)
    kind = cast(Kind, kind_of(task))
    weights = sum(file.size for file in sources.model.files if file.path.endswith(".safetensors"))
    size = size_of(weights, sources.config)
    if kind == "encoder" and task != "fill-mask":
        size = replace(size, vocab=0)  # it answers with no row of the vocabulary
    job = Job(recipe=recipe, sources=sources, task=task, kind=kind, config=sources.config, size=size)
    steps, hardware = {}, {}
    for name, options in recipe.targets.items():
        hardware[name] = machines.load(options.hardware)
        gates.check(options.gates, job.kind)
        gates.check(options.unquantized_gates, job.kind)
        made = targets.load(options.runtime).steps(job, name, options, hardware[name])
        steps[name] = (with_pruning(job, options, made), hardware[name])

    def versions(distribution: str, chain: str) -> str:
        try:
            return toolchain.version(distribution, chain, recipe.toolchains)
        except UnavailableError as error:
            extras = sorted({e for o in recipe.targets.values() if (e := targets.load(o.runtime).EXTRA)})
            hint = f"pip install 'enginewright[{','.join(extras)}]'" if chain == "default" else ""
            raise UnavailableError(error.message, hint=error.hint or hint) from None

    return Prepared(path, job, plan(steps, versions, size), hardware)
