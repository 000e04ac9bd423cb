"""The manifest: its bytes, its floats, and the reader that refuses what is hostile or unclear."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact.clean import check_clean
from pipeline.artifact.manifest import (
    File,
    Manifest,
    Runtime,
    StageRecord,
    artifact_id,
    decimal,
    freeze,
    manifest_bytes,
    thaw,
)
from pipeline.artifact.paths import clashes, path_problem
from pipeline.artifact.read import decode
from pipeline.artifact.roles import ROLES, role_of
from pipeline.digest import canonical
from pipeline.errors import RecipeError
from tests.artifact.helpers import DIGEST, facts


def manifest(**changes: Any) -> Manifest:
    file = File(path="model.onnx", size=3, digest=DIGEST, media_type=ROLES["graph"], role="graph")
    return Manifest(**vars(facts(**changes)), files=(file,))


def plain(**changes: Any) -> dict[str, Any]:
    """The manifest as JSON values, with top-level fields changed."""
    return {**json.loads(manifest_bytes(manifest())), **changes}


def problems_of(value: Any) -> list[str]:
    found, problems = decode(value if isinstance(value, bytes) else canonical(value))
    assert found is None, "it was accepted"
    return problems


def file(**changes: Any) -> dict[str, Any]:
    return {"path": "model.onnx", "size": 3, "digest": DIGEST, "media_type": "x/y", "role": "graph", **changes}


def test_round_trip_keeps_every_field_and_the_identity() -> None:
    data = manifest_bytes(manifest())
    found, problems = decode(data)
    assert problems == []
    assert found is not None
    assert manifest_bytes(found) == data
    assert artifact_id(data) == artifact_id(manifest_bytes(found))
    assert thaw(found.recipe) == facts().recipe
    assert found.stages[1].needs == {"export": "export"}


def test_there_is_no_float_in_it_and_no_id() -> None:
    data = manifest_bytes(manifest())

    def refuse(text: str) -> None:
        raise AssertionError(f"a float: {text}")

    value = json.loads(data, parse_float=refuse)
    assert value["recipe"]["targets"]["cpu"]["quantize"] == {"scale": {"$float": "0.002"}, "big": {"$float": "1e-09"}}
    assert artifact_id(data).removeprefix("sha256:").encode() not in data


@pytest.mark.parametrize("value", [0.1, -0.0, 1.0, 1e-300, 5e-324, 1.7976931348623157e308, 2 / 3])
def test_floats_come_back_as_the_same_double(value: float) -> None:
    back = thaw(json.loads(canonical(freeze({"x": [value]}))))["x"][0]
    assert isinstance(back, float)
    assert (back, math.copysign(1, back)) == (value, math.copysign(1, value))
    assert freeze(freeze([value])) == freeze([value])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_floats_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="decimal"):
        decimal(value)
    with pytest.raises(ValueError, match="decimal"):
        freeze({"x": value})


def test_a_name_that_looks_like_our_mark_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\$float"):
        freeze({"$float": 3})


def test_a_field_of_a_later_minor_version_is_tolerated() -> None:
    found, problems = decode(canonical(plain(later="unknown here")))
    assert problems == []
    assert found is not None


HOSTILE_PATHS = {
    "/etc/passwd": "absolute",
    "../outside": "..",
    "a/../../outside": "..",
    "a\\b": "backslash",
    "C:/windows": "absolute",
    "file.txt:stream": "colon",
    "a\x00b": "control",
    "a\nb": "control",
    "a\u202eb": "control",
    "": "empty",
    "a//b": "empty segment",
    "./a": "empty segment",
    "a/": "empty segment",
    "a./b": "dot or a space",
    "nul.txt": "device",
    "manifest.json": "artifact itself",
    "MANIFEST.JSON": "artifact itself",
    ".attest/parity.json": "artifact itself",
}


@pytest.mark.parametrize(("path", "why"), HOSTILE_PATHS.items(), ids=[repr(path) for path in HOSTILE_PATHS])
def test_hostile_paths_are_refused(path: str, why: str) -> None:
    problems = problems_of(plain(files=[file(path=path)]))
    assert any("$.files[0].path" in problem and why in problem for problem in problems), problems
    assert not any(char in problem for problem in problems for char in "\x00\n\u202e")


@pytest.mark.parametrize("path", ["model.onnx", "onnx/model.onnx.data", "1_Pooling/config.json", "é.json", ".hidden"])
def test_honest_paths_pass(path: str) -> None:
    assert path_problem(path) is None


@pytest.mark.parametrize(
    ("paths", "why"),
    [
        (["A.json", "a.json"], "case"),
        (["e\u0301.json", "\u00e9.json"], "case"),
        (["Straße", "STRASSE"], "case"),
        (["a.json", "a.json"], "case"),
        (["a", "a/b"], "is a file"),
    ],
)
def test_paths_that_cannot_stand_side_by_side(paths: list[str], why: str) -> None:
    assert why in clashes(paths)[0]
    assert any(why in problem for problem in problems_of(plain(files=[file(path=path) for path in sorted(paths)])))


BROKEN: dict[str, tuple[Any, str]] = {
    "not json": (b"{", "strict JSON"),
    "not utf-8": (b'{"a": "\xff"}', "strict JSON"),
    "not an object": (b"[]", "not an object"),
    "a name twice": (b'{"name":"a","name":"b"}', "twice"),
    "nan": (b'{"x":NaN}', "float"),
    "a float": (b'{"x":0.5}', "float"),
    "deep": (b"[" * 100_000, "nested"),
    "no schema": ({"name": "x"}, "$.schema"),
    "another schema": (plain(schema="https://example.org/v1"), "$.schema"),
    "a later major version": (plain(schema="urn:enginewright:artifact:v2"), "update enginewright"),
    "not canonical": (json.dumps(plain(), indent=1).encode(), "canonical"),
    "a digest in capitals": (plain(files=[file(digest=DIGEST.upper())]), "$.files[0].digest"),
    "a short digest": (plain(files=[file(digest="sha256:abc")]), "$.files[0].digest"),
    "another algorithm": (plain(files=[file(digest="md5:" + "0" * 64)]), "$.files[0].digest"),
    "a negative size": (plain(files=[file(size=-1)]), "$.files[0].size"),
    "a size as text": (plain(files=[file(size="3")]), "$.files[0].size"),
    "a size that is true": (plain(files=[file(size=True)]), "$.files[0].size"),
    "an unknown role": (plain(files=[file(role="virus")]), "$.files[0].role"),
    "no files": (plain(files=[]), "$.files"),
    "files out of order": (plain(files=[file(path="b"), file(path="a")]), "sorted"),
    "files is an object": (plain(files={}), "$.files"),
    "a missing field": ({name: value for name, value in plain().items() if name != "target"}, "$.target: is missing"),
    "a gate that is no number": (plain(gates={"kld_mean": "low"}), "$.gates.kld_mean"),
    "a gate of infinity": (plain(gates={"kld_mean": "inf"}), "$.gates.kld_mean"),
    "a hostile name of a gate": (plain(gates={"\x1b[31m": "x"}), "$.gates['\\x1b[31m']"),
    "a float of another form": (plain(quantization={"ratio": {"$float": "0.50"}}), "$.quantization.ratio"),
    "an entry outside": (plain(runtime={**plain()["runtime"], "entry": "../x"}), "$.runtime.entry"),
    "an entry that is not there": (plain(runtime={**plain()["runtime"], "entry": "x"}), "$.runtime.entry"),
    "a source path outside": (
        plain(sources=[{"name": "m", "uri": "u", "files": [{"path": "../x", "size": 1, "digest": DIGEST}]}]),
        "$.sources[0].files[0].path",
    ),
    "a stage that needs a later one": (
        plain(stages=[{"id": "a", "stage": "s", "version": 1, "key": "k", "needs": {"x": "b"}}]),
        "$.stages[0].needs",
    ),
    "an unknown scope": (
        plain(stages=[{"id": "a", "stage": "s", "version": 1, "key": "k", "scope": "moon"}]),
        "$.stages[0].scope",
    ),
}


@pytest.mark.parametrize(("value", "why"), BROKEN.values(), ids=list(BROKEN))
def test_broken_manifests_are_refused_with_the_place(value: Any, why: str) -> None:
    problems = problems_of(value)
    assert any(why in problem for problem in problems), problems
    assert not any("\x1b" in problem for problem in problems)


def test_all_problems_at_once() -> None:
    problems = problems_of(plain(files=[file(size=-1, role="x", digest="y")], precision=4, version=""))
    assert len(problems) == 5, problems


def test_a_manifest_beyond_the_integers_of_json_is_refused() -> None:
    data = manifest_bytes(manifest()).replace(b'"size":3', b'"size":9007199254740993')
    assert any("canonical" in problem or "$.files[0].size" in problem for problem in problems_of(data))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"recipe": {"model": {"source": "/srv/models/x"}}}, "absolute path"),
        ({"recipe": {"model": {"source": "/home/alice/x"}}}, "home directory"),
        ({"recipe": {"model": {"source": "~/x"}}}, "absolute path"),
        ({"recipe": {"model": {"source": "D:\\models"}}}, "absolute path"),
        ({"recipe": {"model": {"source": "../../alice/model"}}}, "user's name"),
        ({"recipe": {"/opt/x/y": 1}}, "absolute path"),
        ({"runtime": Runtime(engine="e", layout="l", command=("serve", "--model=/data/x/y"))}, "absolute path"),
        ({"description": "built by alice@host"}, "user's name"),
        ({"description": "built 2026-11-22T10:00:00Z"}, "a time"),
        ({"stages": (StageRecord(id="a", stage="s", version=1, key="file:///tmp/x"),)}, "absolute path"),
    ],
)
def test_traces_of_the_machine_are_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError, match=why) as caught:
        check_clean(freeze(manifest(**changes)), home=Path("/home/alice"), user="alice")
    assert caught.value.exit_code == 64


def test_honest_manifests_are_clean_for_users_whose_name_is_a_word() -> None:
    names = ("/model/layers.0/mlp/MatMul", "/lm_head/MatMul")
    made = manifest(
        sources=(replace(facts().sources[0], uri="hf://cpu/tiny"),),
        stages=(replace(facts().stages[0], outputs={"onnx/model.onnx": DIGEST}),),
        recipe={"model": {"source": "hf://cpu/tiny"}, "targets": {"cpu": {"exclude_nodes": names}}},
    )
    for user in ("cpu", "tiny", "model", "onnx", ""):
        check_clean(freeze(made), home=Path("/home/cpu"), user=user)


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("model.onnx", "graph"),
        ("model.onnx.data", "weights"),
        ("tokenizer.json", "tokenizer"),
        ("openvino_tokenizer.xml", "tokenizer"),
        ("chat_template.jinja", "template"),
        ("golden/outputs.logits.npy", "golden"),
        ("LICENSE", "license"),
        ("LICENSE.txt", "license"),
        ("license_head.onnx", "graph"),
        ("README.md", "doc"),
        ("genai_config.json", "serving"),
        ("config.json", "config"),
        ("1/model.plan", "engine"),
    ],
)
def test_roles(path: str, role: str) -> None:
    assert role_of(path) == role
