"""Typed values to JSON-able ones and back: the form that step keys, job files and manifests hold."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from functools import cache
from itertools import count
from typing import Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
Variant = Callable[[type, Mapping[str, Any]], type]
"""(declared class, the data) -> the class to read the data as: how `targets.<name>` becomes its backend's Options."""


class Option(NamedTuple):
    """A field of a dataclass with its annotation resolved, whether declared by `option()` or plainly."""

    name: str
    type: Any
    required: bool
    metadata: Mapping[str, Any]
    field: dataclasses.Field[Any]

    def default(self) -> Any:
        """The default of a field that is not required."""
        factory = self.field.default_factory
        return self.field.default if factory is dataclasses.MISSING else factory()


@cache
def options_of(cls: type) -> tuple[Option, ...]:
    """The fields of a dataclass that its constructor takes, in the order of their declaration."""
    hints = get_type_hints(cls)
    missing = dataclasses.MISSING
    return tuple(
        Option(f.name, hints[f.name], f.default is missing and f.default_factory is missing, f.metadata, f)
        for f in dataclasses.fields(cls)
        if f.init
    )


def members(tp: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone. `None` is spelled NoneType."""
    return get_args(tp) if get_origin(tp) in (Union, types.UnionType) else (tp,)


def to_plain(value: Any, *, keyed: bool = False) -> Any:
    """A dataclass, tuple, dict or scalar as dicts, lists and scalars, with every default written out.

    Fields keep the order of their declaration and dicts are sorted, so that equal values give equal JSON text.
    `keyed` leaves out the fields declared with `key=False`. Raises TypeError for what JSON cannot hold.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{value} has no JSON form")
        return value
    if isinstance(value, (tuple, list)):
        return [to_plain(item, keyed=keyed) for item in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a mapping needs text keys to have a JSON form")
        return {key: to_plain(value[key], keyed=keyed) for key in sorted(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            option.name: to_plain(getattr(value, option.name), keyed=keyed)
            for option in options_of(type(value))
            if not keyed or option.metadata.get("key", True)
        }
    raise TypeError(f"{type(value).__name__} has no JSON form")


def from_plain(tp: type[T], data: Any, *, variant: Variant | None = None) -> T:
    """The strict inverse of `to_plain`: unknown, missing and wrongly typed fields raise ValueError with their path.

    An int is taken where a float is declared, because canonical JSON writes 1.0 as 1.
    """
    return cast(T, _read(tp, data, "$", variant))


def _read(tp: Any, data: Any, where: str, variant: Variant | None) -> Any:
    choices = members(tp)
    if len(choices) > 1:
        return _read_union(choices, data, where, variant)
    origin, args = get_origin(tp), get_args(tp)
    if tp is Any:
        return data
    if tp is type(None) and data is None:
        return None
    if tp is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        return float(data)
    if tp in (str, bool, int) and type(data) is tp:
        return data
    if origin is Literal and any(type(data) is type(choice) and data == choice for choice in args):
        return data
    if origin is tuple and isinstance(data, list):
        kinds = (args[0],) * len(data) if args[-1:] == (...,) else args
        if len(kinds) == len(data):
            return tuple(_read(kind, item, f"{where}[{i}]", variant) for i, kind, item in zip(count(), kinds, data))
    if origin is list and isinstance(data, list):
        return [_read(args[0], item, f"{where}[{i}]", variant) for i, item in enumerate(data)]
    if (origin is dict or origin is Mapping or tp is dict) and isinstance(data, Mapping):
        item = args[1] if args else Any
        return {str(key): _read(item, value, f"{where}.{key}", variant) for key, value in data.items()}
    if dataclasses.is_dataclass(tp) and isinstance(tp, type) and isinstance(data, Mapping):
        return _read_dataclass(variant(tp, data) if variant else tp, data, where, variant)
    raise ValueError(f"{where}: expected {getattr(tp, '__name__', tp)}, got {str(data)[:60]!r}")


def _read_union(choices: tuple[Any, ...], data: Any, where: str, variant: Variant | None) -> Any:
    # An exact type wins over a wider one, so that `float | int` gives 4 back as the int that was written.
    for choice in sorted(choices, key=lambda choice: choice is not type(data)):
        try:
            return _read(choice, data, where, variant)
        except ValueError as error:
            last = error
    raise last


def _read_dataclass(cls: type, data: Mapping[str, Any], where: str, variant: Variant | None) -> Any:
    options = {option.name: option for option in options_of(cls)}
    for name in data:
        if name not in options:
            raise ValueError(f"{where}: unknown field {name!r}")
    for option in options.values():
        if option.required and option.name not in data:
            raise ValueError(f"{where}: missing field {option.name!r}")
    return cls(**{name: _read(options[name].type, value, f"{where}.{name}", variant) for name, value in data.items()})
