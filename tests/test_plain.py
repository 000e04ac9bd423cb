"""Typed values to JSON-able ones and back."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.plain import from_plain, options_of, to_plain
from pipeline.recipe import Data, Parity, option
from tests.recipes import Options, Quantize


@dataclass(frozen=True)
class Inner:
    """Declared plainly."""

    number: float = 1.0
    flags: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Other:
    """Told from Inner by its field."""

    text: str


@dataclass(frozen=True)
class Outer:
    """Every kind of field a stage's options may have."""

    name: str
    both: Inner | Other | None = None
    each: tuple[Inner, ...] = ()
    pair: tuple[int, str] = (1, "a")
    by_name: dict[str, Inner | None] = field(default_factory=dict)
    mode: Literal["a", 4, True] = "a"
    wide: int | float = 0
    free: dict[str, Any] = field(default_factory=dict)
    log: str = option("", "How it runs, not what it makes.", key=False)


INNER = st.builds(Inner, st.floats(allow_nan=False, allow_infinity=False), st.lists(st.booleans()).map(tuple))
OUTER = st.builds(
    Outer,
    name=st.text(),
    both=st.one_of(st.none(), INNER, st.builds(Other, st.text())),
    each=st.lists(INNER, max_size=3).map(tuple),
    pair=st.tuples(st.integers(), st.text()),
    by_name=st.dictionaries(st.text(), st.one_of(st.none(), INNER), max_size=3),
    mode=st.sampled_from(["a", 4, True]),
    wide=st.one_of(st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False)),
    free=st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.none()), max_size=3),
)


@given(OUTER)
def test_json_gives_back_what_it_was_given(value: Outer) -> None:
    back = from_plain(Outer, json.loads(json.dumps(to_plain(value))))
    assert back == value
    assert [type(part) for part in dataclasses.astuple(back)] == [type(part) for part in dataclasses.astuple(value)]


def test_defaults_are_written_out_in_the_order_of_declaration() -> None:
    assert to_plain(Parity(data=Data(path="x"))) == {
        "data": {"path": "x", "samples": 32, "length": 256},
        "prompts": None,
        "prompt_count": 8,
        "new_tokens": 32,
        "seed": 0,
    }
    assert list(to_plain(Outer("x"))) == [each.name for each in options_of(Outer)]


def test_the_order_of_a_mapping_does_not_show() -> None:
    one, two = Outer("x", free={"b": 1, "a": 2}), Outer("x", free={"a": 2, "b": 1})
    assert json.dumps(to_plain(one)) == json.dumps(to_plain(two))


def test_what_says_how_a_step_runs_stays_out_of_its_key() -> None:
    assert "log" in to_plain(Outer("x", log="a")) and "log" not in to_plain(Outer("x", log="a"), keyed=True)
    nested = to_plain(Options(runtime="copy", session={"a": "1"}), keyed=True)
    assert "session" not in nested and nested["gates"] == {}


def test_an_integer_is_taken_for_a_float() -> None:
    number = from_plain(Inner, {"number": 1}).number
    assert number == 1.0 and isinstance(number, float)


def test_a_variant_reads_a_section_as_another_class() -> None:
    def variant(cls: type, data: Any) -> type:
        return Quantize if cls is Inner else cls

    assert from_plain(dict[str, Inner], {"q": {"bits": 8}}, variant=variant) == {"q": Quantize(bits=8)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"\$: missing field 'name'"),
        ({"name": "x", "nmae": 1}, r"\$: unknown field 'nmae'"),
        ({"name": 1}, r"\$\.name: expected str, got '1'"),
        ({"name": "x", "each": [{"number": "1"}]}, r"\$\.each\[0\]\.number: expected float, got '1'"),
        ({"name": "x", "each": [{"number": True}]}, r"\$\.each\[0\]\.number: expected float"),
        ({"name": "x", "each": {}}, r"\$\.each: expected"),
        ({"name": "x", "pair": [1]}, r"\$\.pair: expected"),
        ({"name": "x", "by_name": []}, r"\$\.by_name: expected"),
        ({"name": "x", "mode": "b"}, r"\$\.mode: expected"),
        ({"name": "x", "mode": 1}, r"\$\.mode: expected"),
        ({"name": "x", "wide": True}, r"\$\.wide: expected"),
        ({"name": "x", "both": {"txet": ""}}, r"\$\.both"),
        ([], r"\$: expected Outer"),
        (None, r"\$: expected Outer"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_path(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_plain(Outer, data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, {1, 2}, b"x", object(), Outer])
def test_what_json_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        to_plain({"a": [value]})


def test_it_needs_the_standard_library_only() -> None:
    code = "import sys, pipeline.plain; print(sorted({'yaml', 'numpy', 'click'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
