"""A class made frozen does what a frozen dataclass of the standard library does."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, cast

import pytest

from pipeline.frozen import frozen


@frozen
class Point:
    """Two positional fields, one of them optional."""

    x: int
    y: int = 2
    tags: list[str] = field(default_factory=list, compare=False, repr=False)
    count: ClassVar[int] = 0

    @cached_property
    def total(self) -> int:
        """Kept beside the fields."""
        return self.x + self.y


@dataclass(frozen=True)
class Twin:
    """The same, by the standard library."""

    x: int
    y: int = 2
    tags: list[str] = field(default_factory=list, compare=False, repr=False)


@frozen(kw_only=True)
class Base:
    """Inherited from."""

    name: str
    size: int = 1

    def __post_init__(self) -> None:
        """Refuses what no single field can."""
        if self.size < 0:
            raise ValueError("size")


@frozen(kw_only=True)
class Derived(Base):
    """A required field after an optional one of its base."""

    extra: str
    size: int = 5


@dataclass(frozen=True, kw_only=True)
class Plain(Base):
    """What a plug-in writes that knows of dataclasses alone."""

    more: int = 3


# For calls that a type checker refuses.
Point_, Base_, Derived_ = (cast(Any, each) for each in (Point, Base, Derived))


def test_fields_defaults_and_order_are_those_of_a_dataclass() -> None:
    mine, other = Point(1, tags=["a"]), Twin(1, tags=["a"])
    assert repr(mine) == "Point(x=1, y=2)" and repr(other) == "Twin(x=1, y=2)"
    assert vars(mine) == vars(other) and list(vars(mine)) == list(vars(other)) == ["x", "y", "tags"]
    assert dataclasses.asdict(mine) == dataclasses.asdict(other)
    assert [each.name for each in dataclasses.fields(mine)] == ["x", "y", "tags"]
    assert Point(1).tags is not Point(1).tags
    assert dataclasses.replace(mine, y=7) == Point(1, 7) and mine.total == 3 and mine.total == 3


def test_equality_and_hash_look_at_the_compared_fields_of_the_same_class() -> None:
    assert Point(1, tags=["a"]) == Point(1, tags=["b"]) != Point(2)
    assert hash(Point(1, tags=["a"])) == hash(Point(1, tags=["b"])) == hash(Twin(1))
    assert Point_(1) != Twin(1) and {Point(1): "one"}[Point(1)] == "one"
    with pytest.raises(TypeError, match="unhashable"):
        hash(Base(name=["a list"]))  # type: ignore[arg-type]


def test_it_is_frozen() -> None:
    point = Point(1)
    with pytest.raises(dataclasses.FrozenInstanceError, match="x"):
        point.x = 3  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError, match="x"):
        del point.x
    with pytest.raises(dataclasses.FrozenInstanceError):
        Derived(name="a", extra="b").size = 3  # type: ignore[misc]
    assert point.x == 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Point_(), "missing arguments: 'x'"),
        (lambda: Point_(1, 2, [], 4), "takes 3 positional arguments, 4 given"),
        (lambda: Point_(1, x=2), "multiple values for argument 'x'"),
        (lambda: Point_(1, z=2), "unexpected keyword argument 'z'"),
        (lambda: Base_("a"), "takes 0 positional arguments, 1 given"),
        (lambda: Derived_(name="a"), "missing arguments: 'extra'"),
        (lambda: Derived_(size=1), "missing arguments: 'name', 'extra'"),
    ],
)
def test_wrong_arguments_are_named(wrong: Callable[[], Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        wrong()


def test_frozen_classes_and_dataclasses_inherit() -> None:
    assert repr(Derived(name="a", extra="b")) == "Derived(name='a', size=5, extra='b')"
    assert repr(Plain(name="a")) == "Plain(name='a', size=1, more=3)" and Plain(name="a") == Plain(name="a")
    with pytest.raises(ValueError, match="size"):
        Derived(name="a", extra="b", size=-1)
    with pytest.raises(ValueError, match="size"):
        dataclasses.replace(Plain(name="a"), size=-1)
    assert isinstance(Plain(name="a"), Base) and dataclasses.is_dataclass(Plain)


def test_own_methods_are_kept() -> None:
    @frozen
    class Loose:
        """Equal where its name is."""

        name: str
        note: str = ""

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Loose) and self.name == other.name

        def __hash__(self) -> int:
            return 7

        def __repr__(self) -> str:
            return "loose"

    assert Loose("a", "b") == Loose("a", "c") and hash(Loose("a")) == 7 and repr(Loose("a")) == "loose"


def test_copies_and_pickles() -> None:
    point = Point(1, 5, ["a"])
    for twin in (copy.copy(point), copy.deepcopy(point), pickle.loads(pickle.dumps(point))):
        assert twin == point and twin is not point and twin.tags == ["a"]
