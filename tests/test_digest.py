"""Digests: canonical JSON against RFC 8785 and ECMAScript, the stat cache against changes, damage and other writers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import digest
from pipeline.digest import StatCache, canonical, sha256_file, sha256_of, sha256_tree, tree

DAY_S = 86_400


def settled(path: Path, data: bytes) -> Path:
    """A file that was written yesterday."""
    path.write_bytes(data)
    past = path.stat().st_mtime - DAY_S
    os.utime(path, (past, past))
    return path


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ([1, (2, "3")], '[1,[2,"3"]]'),
        ({"b": 1, "a": {"d": None, "c": False}}, '{"a":{"c":false,"d":null},"b":1}'),
        ('"\\/\b\f\n\r\t\x00\x1f\x7f€', '"\\"\\\\/\\b\\f\\n\\r\\t\\u0000\\u001f\x7f€"'),
        ({}, "{}"),
        ([], "[]"),
        (9007199254740991, "9007199254740991"),
    ],
)
def test_canonical_text(value: object, text: str) -> None:
    assert canonical(value) == text.encode()


def test_names_are_sorted_by_utf16_units() -> None:
    # U+1F600 is written with surrogates (D83D), so it comes before U+FB33 although its code point is higher.
    names = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "\u00f6"]
    order = ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]
    assert list(json.loads(canonical(dict.fromkeys(names, 0)))) == order


@pytest.mark.parametrize(
    ("bits", "text"),
    [  # RFC 8785, appendix B
        ("0000000000000000", "0"),
        ("8000000000000000", "0"),
        ("0000000000000001", "5e-324"),
        ("8000000000000001", "-5e-324"),
        ("7fefffffffffffff", "1.7976931348623157e+308"),
        ("4340000000000000", "9007199254740992"),
        ("4430000000000000", "295147905179352830000"),
        ("44b52d02c7e14af5", "9.999999999999997e+22"),
        ("44b52d02c7e14af6", "1e+23"),
        ("444b1ae4d6e2ef50", "1e+21"),
        ("3eb0c6f7a0b5ed8d", "0.000001"),
        ("3eb0c6f7a0b5ed8c", "9.999999999999997e-7"),
        ("41b3de4355555557", "333333333.33333343"),
        ("becbf647612f3696", "-0.0000033333333333333333"),
        ("43143ff3c1cb0959", "1424953923781206.2"),
    ],
)
def test_numbers_as_ecmascript_prints_them(bits: str, text: str) -> None:
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    assert canonical(value) == text.encode()


@pytest.mark.skipif(shutil.which("node") is None, reason="the independent judge of numbers is node")
def test_numbers_agree_with_node() -> None:
    generator = random.Random(0)
    values = [struct.unpack(">d", generator.randbytes(8))[0] for _ in range(5000)]
    values += [generator.uniform(-1, 1) * 10 ** generator.randint(-9, 23) for _ in range(5000)]
    values = [v for v in values if math.isfinite(v)]
    script = "console.log(JSON.stringify(JSON.parse(require('fs').readFileSync(0,'utf8'))))"
    judged = subprocess.run(
        ["node", "-e", script], input=json.dumps(values), capture_output=True, text=True, check=True
    )
    assert canonical(values).decode() == judged.stdout.strip()


@pytest.mark.parametrize("value", [math.nan, math.inf, 2**53, "\ud800", {"\udfff": 1}])
def test_what_json_cannot_carry_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        canonical(value)


@pytest.mark.parametrize("value", [{1: 2}, {"a"}, b"bytes", object()])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(TypeError):
        canonical(value)


def test_digest_of_a_value() -> None:
    assert sha256_of({"b": 1, "a": 2}) == "sha256:" + hashlib.sha256(b'{"a":2,"b":1}').hexdigest()


def test_tree_sees_names_sizes_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b").write_bytes(b"2")
    (tmp_path / "sub" / "a").write_bytes(b"11")
    files = tree(tmp_path)
    assert [(f.path, f.size) for f in files] == [("b", 1), ("sub/a", 2)]
    assert files[0].digest == "sha256:" + hashlib.sha256(b"2").hexdigest()
    assert sha256_tree(reversed(files)) == sha256_tree(files)
    (tmp_path / "b").rename(tmp_path / "c")
    assert sha256_tree(tree(tmp_path)) != sha256_tree(files)


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were hashed from now on."""
    names: list[str] = []

    def spy(path: Path) -> str:
        names.append(Path(path).name)
        return sha256_file(path)

    monkeypatch.setattr(digest, "sha256_file", spy)
    return names


def test_a_file_is_read_once_over_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = settled(tmp_path / "weights", b"x" * 1000)
    expected = sha256_file(file)
    names = reads(monkeypatch)
    assert StatCache(tmp_path / "cache").sha256(file) == expected
    assert StatCache(tmp_path / "cache").sha256(file) == expected
    assert names == ["weights"]


@pytest.mark.parametrize("change", ["bytes", "size", "replaced", "bytes and mtime"])
def test_a_changed_file_is_read_again(tmp_path: Path, change: str) -> None:
    file = settled(tmp_path / "weights", b"old")
    StatCache(tmp_path / "cache").sha256(file)
    before = file.stat()
    if change == "replaced":
        new = settled(tmp_path / "new", b"new")
        os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
        new.replace(file)
    else:
        file.write_bytes(b"new " if change == "size" else b"new")
        if change == "bytes and mtime":
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert StatCache(tmp_path / "cache").sha256(file) == sha256_file(file)


def test_a_fresh_file_is_not_remembered(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"old")
    cache = StatCache(tmp_path / "cache")
    cache.sha256(file)
    assert cache.get(file) is None


def test_a_link_does_not_cost_a_second_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = settled(tmp_path / "weights", b"x" * 1000)
    StatCache(tmp_path / "cache").sha256(file)
    names = reads(monkeypatch)
    (tmp_path / "link").hardlink_to(file)  # moves the ctime
    assert StatCache(tmp_path / "cache").sha256(file)
    (tmp_path / "link").unlink()
    assert StatCache(tmp_path / "cache").sha256(file)
    assert names == []


@pytest.mark.parametrize("damage", ["torn", "flipped", "garbage", "directory", "empty"])
def test_a_damaged_cache_is_never_believed(tmp_path: Path, damage: str) -> None:
    file = settled(tmp_path / "weights", b"x")
    cache = StatCache(tmp_path / "cache")
    expected = cache.sha256(file)
    data = cache.file.read_bytes()
    if damage == "directory":
        cache.file.unlink()
        cache.file.mkdir()
    else:
        flipped = data.replace(expected[-4:].encode(), b"0000" if expected[-4:] != "0000" else b"1111")
        cache.file.write_bytes(
            {"torn": data[: len(data) // 2], "flipped": flipped, "empty": b""}.get(damage, b"\xff{]\n")
        )
    again = StatCache(tmp_path / "cache")
    assert again.get(file) is None
    assert again.sha256(file) == expected
    if damage != "directory":
        assert StatCache(tmp_path / "cache").get(file) == expected


def test_a_file_name_that_is_not_unicode(tmp_path: Path) -> None:
    file = settled(tmp_path / os.fsdecode(b"w\xff"), b"x")
    assert StatCache(tmp_path / "cache").sha256(file) == sha256_file(file)


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    for name in range(40):
        settled(tmp_path / f"f{name}", str(name).encode())
    script = (
        "import sys; from pathlib import Path; from pipeline.digest import StatCache\n"
        "[StatCache(Path('cache')).sha256(Path(f'f{n}')) for n in range(int(sys.argv[1]), 40, 4)]"
    )
    root = str(Path(digest.__file__).parents[1])
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(n)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root})
        for n in range(4)
    ]
    assert [w.wait() for w in writers] == [0] * 4
    cache = StatCache(tmp_path / "cache")
    assert [cache.get(tmp_path / f"f{n}") for n in range(40)] == [sha256_file(tmp_path / f"f{n}") for n in range(40)]


def test_a_cache_of_stale_lines_is_compacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = settled(tmp_path / "weights", b"x")
    cache = StatCache(tmp_path / "cache")
    monkeypatch.setattr(StatCache, "COMPACT_AT", 8)
    for _ in range(20):
        cache.put(file, sha256_file(file))
    before = cache.file.stat().st_size
    assert StatCache(tmp_path / "cache").get(file) == sha256_file(file)
    assert cache.file.stat().st_size < before / 10
