"""The strict reader of manifest.json: bytes in, a Manifest or everything that is wrong with it out."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pipeline.artifact import paths
from pipeline.artifact.manifest import SCHEMA, Manifest, is_float
from pipeline.digest import canonical
from pipeline.errors import RecipeError, VerificationError

MAX_BYTES = 64 * 2**20
"""A manifest larger than this is not read."""

HINT = "give the folder of an artifact: the one that holds manifest.json"

Problems = list[str]


def load(artifact: Path) -> tuple[Manifest, bytes]:
    """The manifest of the artifact in a folder, with its bytes. The files are not looked at (see verify.py)."""
    data = manifest_file(artifact)
    manifest, problems = decode(data)
    if manifest is None:
        raise VerificationError(
            f"{artifact / paths.MANIFEST} is not a manifest:" + "".join(f"\n  {problem}" for problem in problems),
            hint="build it again, or fetch it again from where it came",
        )
    return manifest, data


def manifest_file(artifact: Path) -> bytes:
    """The bytes of an artifact's manifest.json. RecipeError when the folder is missing, a draft, or the one above
    several artifacts, VerificationError otherwise."""
    path = artifact / paths.MANIFEST
    if not artifact.is_dir():
        what = "is a file, not a folder" if artifact.exists() else "does not exist"
        raise RecipeError(f"{artifact} {what}", hint=HINT)
    if path.is_symlink() or not path.is_file():
        missing = not (path.is_symlink() or path.exists())
        if missing:
            not_above(artifact)
            not_draft(artifact)
        raise VerificationError(f"{path} {'is missing' if missing else 'is not a regular file'}", hint=HINT)
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise VerificationError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error


def not_above(folder: Path) -> None:
    """RecipeError for the folder of a build, which holds an artifact for each target, and is none itself."""
    if held := sorted(str(path.parent) for path in folder.glob(f"*/{paths.MANIFEST}")):
        raise RecipeError(f"{folder} holds artifacts, and is none itself", hint=f"give one: {', '.join(held)}")


def not_draft(folder: Path) -> None:
    """RecipeError for what `enginewright draft` made, which nothing has proved."""
    if (folder / paths.DRAFT).is_file():
        hint = "`build` with the same recipe proves the engine and makes the artifact, without building it again"
        raise RecipeError(f"{folder} is a draft, not an artifact: nothing has proved it", hint=hint)


def decode(data: bytes) -> tuple[Manifest | None, Problems]:
    """A manifest from its bytes, or None and what is wrong, every problem with its place (`$.files[3].path`)."""
    if len(data) > MAX_BYTES:
        return None, [f"$: is larger than {MAX_BYTES} bytes"]
    try:
        return _decode(data)
    except RecursionError:
        return None, ["$: is nested too deeply"]


def _decode(data: bytes) -> tuple[Manifest | None, Problems]:
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_no_float,
            parse_constant=_no_float,
        )
    except ValueError as error:  # includes UnicodeDecodeError and JSONDecodeError
        return None, [f"$: is not strict JSON: {error}"]
    if not isinstance(value, dict):
        return None, ["$: is not an object"]
    if value.get("schema") != SCHEMA:
        return None, [_schema_problem(value.get("schema"))]
    problems: Problems = []
    manifest = _object(Manifest, value, "$", problems)
    try:
        if canonical(value) != data:
            problems.append("$: is not canonical JSON (RFC 8785), so its digest says nothing")
    except ValueError as error:
        problems.append(f"$: has no canonical form: {error}")
    if not problems:
        problems += _cross_checks(manifest)
    return (None, problems) if problems else (manifest, [])


def _cross_checks(manifest: Manifest) -> Problems:
    """What no field shows alone."""
    listed = [file.path for file in manifest.files]
    problems = [f"$.files: {clash}" for clash in paths.clashes(listed)]
    if listed != sorted(listed):
        problems.append("$.files: are not sorted by path")
    if not listed:
        problems.append("$.files: is empty")
    for index, source in enumerate(manifest.sources):
        problems += [f"$.sources[{index}].files: {clash}" for clash in paths.clashes(f.path for f in source.files)]
    entry = manifest.runtime.entry
    if entry != ".":
        if problem := paths.path_problem(entry):
            problems.append(f"$.runtime.entry: '{entry}' {problem}")
        elif not any(path == entry or path.startswith(f"{entry}/") for path in listed):
            problems.append(f"$.runtime.entry: '{entry}' is not one of the files")
    known: set[str] = set()
    for index, stage in enumerate(manifest.stages):
        problems += [
            f"$.stages[{index}].needs: '{need}' is not an earlier step"
            for need in stage.needs.values()
            if need not in known
        ]
        if stage.id in known:
            problems.append(f"$.stages[{index}].id: '{stage.id}' stands twice")
        known.add(stage.id)
    return problems


def _schema_problem(schema: Any) -> str:
    major = re.fullmatch(r"urn:enginewright:artifact:v(\d+)", schema) if isinstance(schema, str) else None
    if major:
        return f"$.schema: version {major[1]} is not known here (this enginewright reads 1): update enginewright"
    return f"$.schema: {schema!r:.100} is not {SCHEMA!r}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r:.100} stands twice in one object")
        found[name] = value
    return found


def _no_float(text: str) -> Any:
    raise ValueError(f"{text:.40} is a float, and a manifest has none")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _object(cls: type, value: Any, where: str, problems: Problems) -> Any:
    """A dataclass from a JSON object; names that the class does not know belong to a later minor version."""
    if not isinstance(value, dict):
        problems.append(f"{where}: is not an object")
        return None
    given = {}
    for item in fields(cls):
        place = f"{where}.{item.name}"
        if item.name in value:
            given[item.name] = _typed(_hints(cls)[item.name], value[item.name], place, problems)
            if (rule := item.metadata.get("rule")) and given[item.name] is not None:
                _apply(rule, given[item.name], place, problems)
        elif item.default is MISSING and item.default_factory is MISSING:
            problems.append(f"{place}: is missing")
    return None if problems else cls(**given)


def _member(where: str, name: str) -> str:
    """The place of a name inside `where`; what came from outside is quoted, so that it cannot steer a terminal."""
    return f"{where}.{name}" if re.fullmatch(r"[\w.-]{1,80}", name) else f"{where}[{name!r:.80}]"


def _apply(rule: Callable[[Any], str | None], value: Any, where: str, problems: Problems) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            if item is not None:
                _apply(rule, item, _member(where, name), problems)
    elif problem := rule(value):
        problems.append(f"{where}: {value!r:.200} {problem}")


def _typed(hint: Any, value: Any, where: str, problems: Problems) -> Any:
    """`value` as the type `hint` says, or None and a problem."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        _free(value, where, problems)
        return value
    if is_dataclass(hint):
        return _object(hint, value, where, problems)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        if len(options) == 1:
            return _typed(options[0], value, where, problems)
        if type(value) in options:
            return value
        problems.append(f"{where}: {value!r:.100} is not {' or '.join(option.__name__ for option in options)}")
        return None
    if origin is tuple:
        if isinstance(value, list):
            return tuple(_typed(arguments[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))
        problems.append(f"{where}: is not a list")
        return None
    if origin is Mapping:
        if isinstance(value, dict):
            return {name: _typed(arguments[1], item, _member(where, name), problems) for name, item in value.items()}
        problems.append(f"{where}: is not an object")
        return None
    if origin is Literal:
        if value not in arguments:
            problems.append(f"{where}: {value!r:.100} is not one of {', '.join(map(repr, arguments))}")
        return value
    if type(value) is not hint:
        problems.append(f"{where}: {value!r:.100} is not {hint.__name__}")
        return None
    return value


def _free(value: Any, where: str, problems: Problems) -> None:
    """Free-form JSON: a float must be written as `{"$float": ...}`, in its shortest form."""
    if isinstance(value, dict):
        if "$float" in value and not is_float(value):
            problems.append(f"{where}: {value!r:.100} is not a float as a manifest writes it")
            return
        for name, item in value.items():
            _free(item, _member(where, name), problems)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _free(item, f"{where}[{index}]", problems)
