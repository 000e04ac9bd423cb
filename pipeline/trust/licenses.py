"""Whether an SPDX expression is satisfied by a list of licences that are allowed."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"\(|\)|[A-Za-z0-9.+:-]+")
MAX_WORDS = 200


def allowed(expression: str, licenses: Sequence[str]) -> bool:
    """`A OR B` needs one of them, `A AND B` both; `A WITH exception` is a licence of its own. False when unreadable."""
    words = _WORD.findall(expression)
    if not words or len(words) > MAX_WORDS or _WORD.sub("", expression).strip():
        return False
    known = {each.casefold() for each in licenses}
    try:
        value, rest = _or(words, known)
    except (IndexError, RecursionError):
        return False
    return value and not rest


def _or(words: list[str], known: set[str]) -> tuple[bool, list[str]]:
    value, rest = _and(words, known)
    while rest and rest[0].upper() == "OR":
        other, rest = _and(rest[1:], known)
        value = value or other
    return value, rest


def _and(words: list[str], known: set[str]) -> tuple[bool, list[str]]:
    value, rest = _one(words, known)
    while rest and rest[0].upper() == "AND":
        other, rest = _one(rest[1:], known)
        value = value and other
    return value, rest


def _one(words: list[str], known: set[str]) -> tuple[bool, list[str]]:
    if words[0] == "(":
        value, rest = _or(words[1:], known)
        if rest[0] != ")":
            raise IndexError
        return value, rest[1:]
    if words[0] == ")" or words[0].upper() in ("AND", "OR", "WITH"):
        raise IndexError
    if len(words) > 2 and words[1].upper() == "WITH":
        return f"{words[0]} WITH {words[2]}".casefold() in known, words[3:]
    return words[0].casefold() in known, words[1:]
