"""Frozen dataclasses whose methods are shared instead of generated.

`dataclasses` writes six methods for every class as text and compiles them, half a millisecond a class. A build that has
all its results in the store defines about eighty classes and does little else: that was a quarter of its time.
`fields`, `replace`, `asdict`, `is_dataclass`, inheritance and `__post_init__` are those of the standard library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, FrozenInstanceError, dataclass, field, fields
from typing import Any, NamedTuple, TypeVar, cast, dataclass_transform, overload

T = TypeVar("T")


class _Shape(NamedTuple):
    """What the shared methods have to know of a class."""

    positional: tuple[str, ...]
    blank: dict[str, Any]
    """Every field in order with its default, or MISSING."""
    required: frozenset[str]
    factories: tuple[tuple[str, Callable[[], Any]], ...]
    compared: tuple[str, ...]
    shown: tuple[str, ...]


@overload
def frozen(cls: type[T], /) -> type[T]: ...
@overload
def frozen(*, kw_only: bool = False) -> Callable[[type[T]], type[T]]: ...


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[T] | None = None, /, *, kw_only: bool = False) -> type[T] | Callable[[type[T]], type[T]]:
    """Make a class a frozen dataclass. With `kw_only` its fields are given by name alone."""

    def wrap(cls: type[T]) -> type[T]:
        above = [base.__dict__.get("__dataclass_params__") for base in cls.__mro__[1:]]
        # The standard library wants one word, frozen or not, from all of a line of classes.
        inherits = any(each is not None and each.frozen for each in above)
        made: Any = dataclass(init=False, repr=False, eq=False, frozen=inherits, kw_only=kw_only)(cls)
        made.__dataclass_params__.frozen = True  # so that @dataclass(frozen=True) may inherit
        made.__shape__ = _shape(made)
        for name, method in SHARED.items():
            if vars(made).get(name) is None:  # None: Python's `__hash__` of a class that has its own `__eq__`
                setattr(made, name, method)
        return cast(type[T], made)

    return wrap if cls is None else wrap(cls)


def _shape(cls: Any) -> _Shape:
    every = fields(cls)
    return _Shape(
        positional=tuple(each.name for each in every if not each.kw_only),
        blank={each.name: each.default for each in every},
        required=frozenset(each.name for each in every if each.default is each.default_factory is MISSING),
        factories=tuple((each.name, each.default_factory) for each in every if each.default_factory is not MISSING),
        compared=tuple(each.name for each in every if each.compare),
        shown=tuple(each.name for each in every if each.repr),
    )


def _init(self: Any, *args: Any, **given: Any) -> None:
    shape: _Shape = self.__shape__
    if args:
        _bind(type(self), shape, args, given)
    values = {**shape.blank, **given}
    if len(values) != len(shape.blank) or not shape.required <= given.keys():
        _complain(type(self), shape, given)
    for name, factory in shape.factories:
        if name not in given:
            values[name] = factory()
    self.__dict__.update(values)
    if hasattr(self, "__post_init__"):
        self.__post_init__()


def _bind(cls: type, shape: _Shape, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    """Add positional arguments to those given by name."""
    if len(args) > len(shape.positional):
        raise TypeError(f"{cls.__qualname__}() takes {len(shape.positional)} positional arguments, {len(args)} given")
    for name, value in zip(shape.positional, args, strict=False):
        if name in given:
            raise TypeError(f"{cls.__qualname__}() got multiple values for argument {name!r}")
        given[name] = value


def _complain(cls: type, shape: _Shape, given: dict[str, Any]) -> None:
    if unknown := [name for name in given if name not in shape.blank]:
        raise TypeError(f"{cls.__qualname__}() got an unexpected keyword argument {unknown[0]!r}")
    missing = [name for name in shape.blank if name in shape.required and name not in given]
    raise TypeError(f"{cls.__qualname__}() missing arguments: {', '.join(map(repr, missing))}")


def _compared(self: Any) -> tuple[Any, ...]:
    return tuple([getattr(self, name) for name in self.__shape__.compared])


def _eq(self: Any, other: Any) -> bool:
    return _compared(self) == _compared(other) if type(self) is type(other) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_compared(self))


def _repr(self: Any) -> str:
    said = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__shape__.shown)
    return f"{type(self).__qualname__}({said})"


def _set(self: Any, name: str, value: Any) -> None:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _delete(self: Any, name: str) -> None:
    raise FrozenInstanceError(f"cannot delete field {name!r}")


SHARED: dict[str, Any] = {
    "__init__": _init,
    "__repr__": _repr,
    "__eq__": _eq,
    "__hash__": _hash,
    "__setattr__": _set,
    "__delattr__": _delete,
}
