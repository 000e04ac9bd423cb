"""Digests: of files, of folders and of values in canonical JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterable, Mapping
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any, NamedTuple

SAFE_INTEGER = 2**53 - 1
"""Beyond it a reader of JSON may round: RFC 8785 leaves such integers out."""


def canonical(value: Any) -> bytes:
    """RFC 8785 bytes of None, bool, int, float, str, list, tuple or a mapping with text keys.

    Raises TypeError for other types, ValueError for what JSON cannot carry: NaN, infinities, integers above 2**53 - 1,
    lone surrogates.
    """
    return _canonical(value).encode()


def sha256_of(value: Any) -> str:
    """`sha256:<hex>` of the canonical JSON of `value`."""
    return "sha256:" + hashlib.sha256(canonical(value)).hexdigest()


def sha256_file(path: Path) -> str:
    """`sha256:<hex>` of a file's bytes, read in blocks. Raises OSError."""
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


class FileDigest(NamedTuple):
    """One file of a folder."""

    path: str
    """Relative to the folder, with `/`."""
    size: int
    """Bytes."""
    digest: str


def tree(folder: Path) -> tuple[FileDigest, ...]:
    """Every regular file under `folder`, sorted by path (links are followed). Raises OSError."""
    files = sorted((f.relative_to(folder).as_posix(), f) for f in folder.rglob("*") if f.is_file())
    return tuple(FileDigest(name, f.stat().st_size, sha256_file(f)) for name, f in files)


def sha256_tree(files: Iterable[FileDigest]) -> str:
    """One digest for a folder: of the names, sizes and digests of its files, in any order."""
    return sha256_of(sorted([list(f) for f in files]))


def _canonical(value: Any) -> str:
    if value is None:
        return "null"
    if value is True or value is False:
        return "true" if value else "false"
    if isinstance(value, str):
        return encode_basestring(str(value))
    if isinstance(value, int):
        if abs(value) > SAFE_INTEGER:
            raise ValueError(f"{value} is beyond what JSON readers keep exactly")
        return str(int(value))
    if isinstance(value, float):
        return _number(float(value))
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_canonical, value)) + "]"
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise TypeError("a mapping in canonical JSON has text keys only")
        # Sorted by UTF-16 code units, which differs from Python's order above U+FFFF.
        plain = all(map(str.isascii, value))
        names = sorted(value) if plain else sorted(value, key=lambda name: name.encode("utf-16-be"))
        return "{" + ",".join(f"{encode_basestring(name)}:{_canonical(value[name])}" for name in names) + "}"
    raise TypeError(f"{type(value).__name__} has no canonical JSON")


def _number(value: float) -> str:
    """A float as ECMAScript prints it: Python's shortest digits, with the point where ECMAScript puts it."""
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{value} has no canonical JSON")
    if value == 0:
        return "0"  # -0 too
    sign = "-" if value < 0 else ""
    mantissa, _, power = repr(abs(value)).partition("e")
    whole, _, fraction = mantissa.partition(".")
    fraction = "" if fraction == "0" else fraction
    digits = (whole + fraction).lstrip("0")
    point = len(whole) + int(power or 0) - (len(whole + fraction) - len(digits))
    digits = digits.rstrip("0")
    if len(digits) <= point <= 21:
        return sign + digits + "0" * (point - len(digits))
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    tail = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{tail}e{point - 1:+d}"


class StatCache:
    """Digests of files that have not changed since they were hashed, so that a large model is read once.

    A file is known by its real path, size, mtime, inode and ctime (the last only while it has a single name: linking a
    file moves its ctime). The cache is one file of checked lines that many processes append to: a line that is torn or
    damaged is ignored, and a folder that cannot be written only costs time.
    """

    SETTLED_S = 2.0
    """A file changed this recently could change again within one tick of its clock: it is not remembered."""
    COMPACT_AT = 4096
    """Lines, of which most are stale: then the file is rewritten."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "digests.ndjson"
        self._known: dict[str, list[Any]] = {}
        lines = 0
        with contextlib.suppress(OSError), self.file.open("rb") as stream:
            for line in stream:
                lines += 1
                with contextlib.suppress(ValueError, TypeError, LookupError):
                    check, _, text = line.strip().partition(b" ")
                    if int(check, 16) == zlib.crc32(text):
                        path, *facts = json.loads(text)
                        self._known[path] = facts  # none: forgotten
        if lines > max(self.COMPACT_AT, 4 * len(self._known)):
            self._rewrite()

    def get(self, path: Path, *, strict: bool = False) -> str | None:
        """The digest of `path`, if it is the file that was hashed. Raises OSError when the file cannot be looked at.

        Making or removing another link to a file moves its ctime, so of a linked file it says nothing; `strict` wants
        it unmoved all the same.
        """
        real = os.path.realpath(path)
        known = self._known.get(real)
        if not known:
            return None
        now, then = _facts(real), known[:-1]
        if not strict and (now[-1] > 1 or then[-1] > 1):
            now, then = now[:-2], then[:-2]
        return str(known[-1]) if now == then else None

    def put(self, path: Path, digest: str) -> None:
        """Remember `digest` as that of `path` as it is now."""
        real = os.path.realpath(path)
        facts = _facts(real)
        if time.time() - facts[1] / 1e9 >= self.SETTLED_S:
            self._write(real, [*facts, digest])

    def forget(self, path: Path) -> None:
        """Have the file read again next time."""
        self._write(os.path.realpath(path), [])

    def sha256(self, path: Path) -> str:
        """The digest of `path`, read only if it is not known. Raises OSError."""
        digest = self.get(path)
        if digest is not None:
            if self._known[os.path.realpath(path)][:-1] != _facts(os.path.realpath(path)):
                self.put(path, digest)  # it was linked since
        else:
            before = _facts(os.path.realpath(path))
            digest = sha256_file(path)
            if _facts(os.path.realpath(path))[:4] == before[:4]:
                self.put(path, digest)
        return digest

    def _write(self, real: str, facts: list[Any]) -> None:
        self._known[real] = facts
        with contextlib.suppress(OSError, ValueError):  # a name that is not Unicode is hashed every time
            self.file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                # One write a line: lines of two processes do not mix. The leading newline ends a torn one.
                os.write(descriptor, b"\n" + _line(real, facts))
            finally:
                os.close(descriptor)

    def _rewrite(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            scratch = self.file.with_name(f".{self.file.name}.{os.getpid()}")
            scratch.write_bytes(b"".join(_line(path, facts) for path, facts in self._known.items()))
            scratch.replace(self.file)


def _facts(path: str) -> list[Any]:
    """Size, mtime, inode, ctime, links: the two that linking a file changes are last."""
    found = Path(path).stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns, found.st_nlink]


def _line(path: str, facts: list[Any]) -> bytes:
    text = json.dumps([path, *facts], ensure_ascii=False, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)
