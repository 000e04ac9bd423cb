"""What TensorRT and TensorRT-RTX can be asked for, from data/tensorrt.toml, and the refusals that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal

from pipeline.errors import RecipeError, UnavailableError
from pipeline.frozen import frozen
from pipeline.tables import table

Name = Literal["tensorrt", "tensorrt-rtx"]


@frozen
class Flavour:
    """One of the two products; they share their API, and little of what they can be asked for."""

    name: str
    title: str
    modules: tuple[str, ...]
    """Python modules that may carry the API, in the order in which they are tried."""
    distribution: str
    """The installed package whose version is the engine's."""
    distributions: tuple[str, ...]
    driver: str
    """Oldest NVIDIA driver that runs the engines."""
    builds_on_cpu: bool
    verified: str
    """How far engines of this flavour have been tried, in words that the docs and the manifest repeat."""
    capabilities: tuple[str, ...]
    lowest: Mapping[str, str]
    """Precision -> the lowest compute capability that runs it."""
    refused: Mapping[str, str]
    """Option of the build -> why this flavour cannot do it."""
    instead: Mapping[str, str]
    """Compute capability -> what serves it where this flavour does not."""


@cache
def flavour(name: str) -> Flavour:
    """A flavour by its name in recipes. KeyError for others."""
    entry = dict(table("tensorrt")[name])
    entry |= {key: tuple(entry[key]) for key in ("modules", "distributions", "capabilities")}
    return Flavour(name=name, **entry)


def number(capability: str) -> tuple[int, int]:
    """`8.6` as a value that sorts."""
    major, _, minor = capability.partition(".")
    return int(major), int(minor)


def sm(capability: str) -> str:
    """`SM86` for `8.6`: what the API calls it."""
    return f"SM{capability.replace('.', '')}"


def check_capabilities(flavour: Flavour, capabilities: Sequence[str], precision: str, together: bool) -> None:
    """Refuse compute capabilities that the builder does not compile for, or that do not run `precision`.

    `together`: they share one engine. Raises UnavailableError, whose hint says what to use instead.
    """
    for capability in capabilities:
        if capability not in flavour.capabilities:
            known = ", ".join(flavour.capabilities)
            raise UnavailableError(
                f"{flavour.title} builds nothing for compute capability {capability} (it knows {known})",
                hint=f"use {flavour.instead.get(capability, 'another runtime, or another machine')}",
            )
    lowest = flavour.lowest[precision]
    for capability in capabilities:
        if number(capability) < number(lowest):
            able = [name for name, needed in flavour.lowest.items() if number(needed) <= number(capability)]
            raise UnavailableError(
                f"precision {precision} needs compute capability {lowest} or higher, and {capability} is asked for",
                hint=f"{capability} runs {', '.join(able)}; or leave that machine out",
            )
    if together and "7.5" in capabilities and len(set(capabilities)) > 1:
        raise UnavailableError(
            "one engine cannot serve compute capability 7.5 beside others: Turing's kernels are chosen apart",
            hint="say `engines: each`, which makes an engine for each of them",
        )


def check_options(flavour: Flavour, asked: Mapping[str, bool]) -> None:
    """Refuse options that the flavour cannot do. `asked` says which are switched on. Raises RecipeError."""
    for name, on in asked.items():
        if on and name in flavour.refused:
            raise RecipeError(
                f"{name}: {flavour.title} cannot do that: {flavour.refused[name]}",
                hint=f"leave `{name}` out"
                + ("" if flavour.name == "tensorrt" else ", or use `runtime: tensorrt` on a machine with the GPU"),
            )
