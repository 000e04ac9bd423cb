"""Decide how many bits each matrix product of a graph gets."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from typing import Protocol

from pipeline.errors import RecipeError, UnavailableError
from pipeline.stages.onnx.patterns import Linear

BITS = {"int8": 8, "int4": 4}
_LAYER = re.compile(r"\blayers?\.(\d+)\.")
_SENSITIVE = re.compile(r"\.(v_proj|qkv_proj|down_proj)\b")
_SMALLEST = 1024
"""Products with fewer weights than this are left alone: there is nothing to gain."""


class Options(Protocol):
    """The fields of WeightOptions that are read here."""

    @property
    def precision(self) -> str: ...
    @property
    def group_size(self) -> int: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def algorithm(self) -> str: ...
    @property
    def accuracy_level(self) -> int: ...
    @property
    def head(self) -> str: ...
    @property
    def embeddings(self) -> str: ...
    @property
    def activations(self) -> str: ...
    @property
    def exclude(self) -> tuple[str, ...]: ...


def placement(linears: list[Linear], head: str, options: Options) -> dict[str, int]:
    """Output name of a product -> its bits; what is left in fp32 is not there."""
    bits = BITS[options.precision]
    plan: dict[str, int] = {}
    unmatched = set(options.exclude)
    for linear in linears:
        output, names = linear.node.output[0], (linear.node.name, linear.weight, linear.weight.removesuffix(".weight"))
        matches = {pattern for pattern in options.exclude if any(fnmatch(name, pattern) for name in names)}
        unmatched -= matches
        if not matches and linear.n * linear.k >= _SMALLEST:
            plan[output] = bits
    if unmatched:
        some = ", ".join(f"'{linear.node.name or linear.weight}'" for linear in linears[:3])
        raise RecipeError(
            f"exclude: '{sorted(unmatched)[0]}' matches no matrix product of the graph", hint=f"names are like {some}"
        )
    if options.algorithm == "k_quant_mixed":
        for output in _sensitive(linears):
            if output in plan:
                plan[output] = max(bits, 8)
        if head in plan and options.head == "same":
            plan[head] = 8
    if head in plan and options.head != "same":
        plan[head] = BITS.get(options.head, 0)
    return plan


def _sensitive(linears: list[Linear]) -> list[str]:
    """Products that lose most by 4 bits: values and down projections of the first and last eighth of the layers and of
    every third layer between."""
    found = []
    layers = [
        int(match[1]) if (match := _LAYER.search(linear.node.name or linear.weight)) else -1 for linear in linears
    ]
    count = max(layers, default=-1) + 1
    if count == 0:
        raise UnavailableError(
            "algorithm k_quant_mixed: the exported graph does not say which product belongs to which layer",
            hint="use algorithm k_quant, or the fused exporter",
        )
    for linear, layer in zip(linears, layers, strict=True):
        outer = layer < count // 8 or layer >= count - max(1, count // 8) or (layer - count // 8) % 3 == 2
        if layer >= 0 and outer and _SENSITIVE.search(linear.node.name or linear.weight):
            found.append(linear.node.output[0])
    return found
