"""manifest.json as types: what an artifact is, and the bytes that give it its identity.

Floats appear nowhere in a manifest. In `recipe`, `quantization` and `runtime.settings` a float is written as
`{"$float": "0.002"}`, the shortest decimal that reads back as the same double; `thaw` gives the float back. Gates are
plain decimal strings. `artifact_id` is the SHA-256 of the canonical bytes and is not stored inside.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass
from typing import Any, Final, Literal

from pipeline.artifact import paths
from pipeline.artifact.roles import role_problem
from pipeline.digest import canonical
from pipeline.frozen import frozen
from pipeline.step import Scope

SCHEMA: Final = "urn:enginewright:artifact:v1"
"""The major version is in the name; a reader tolerates fields that a later minor version adds."""

Json = Any


def _checked(rule: Any, default: Any = ...) -> Any:
    """A field whose value must pass `rule` (see paths.py), element by element where it is a collection."""
    return field(metadata={"rule": rule}) if default is ... else field(default=default, metadata={"rule": rule})


@frozen(kw_only=True)
class SourceFile:
    """A file that the build read."""

    path: str = _checked(paths.path_problem)
    size: int = _checked(paths.size_problem)
    digest: str = _checked(paths.digest_problem)


@frozen(kw_only=True)
class Source:
    """Where something came from: `uri` is `hf://org/name` or a path relative to the recipe, `revision` a commit."""

    name: str = _checked(paths.text_problem)
    uri: str = _checked(paths.text_problem)
    revision: str | None = None
    license: str | None = None
    """SPDX expression, as far as it is known."""
    files: tuple[SourceFile, ...] = ()


@frozen(kw_only=True)
class StageRecord:
    """A step of the build: `needs` maps a role to an earlier step's id, `outputs` a path to its digest."""

    id: str = _checked(paths.text_problem)
    stage: str = _checked(paths.text_problem)
    version: int
    key: str = _checked(paths.text_problem)
    needs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict, metadata={"rule": paths.digest_problem})
    tools: Mapping[str, str] = field(default_factory=dict)
    """Distribution -> version."""
    scope: Scope = "portable"
    toolchain: str = "default"
    deterministic: bool = True


@frozen(kw_only=True)
class Device:
    """What computes. `compute_capability` is that of CUDA devices, as in `9.0`."""

    kind: str = _checked(paths.text_problem, "cpu")
    compute_capability: tuple[str, ...] = ()
    min_memory_bytes: int | None = _checked(paths.size_problem, None)
    min_driver: str | None = None
    """Oldest driver of the device that runs the artifact."""


@frozen(kw_only=True)
class Target:
    """The machine that the artifact is for. `isa` names what the engine needs beyond the architecture's baseline."""

    name: str = _checked(paths.text_problem)
    os: str = "linux"
    arch: str = "x86_64"
    isa: tuple[str, ...] = ()
    device: Device = field(default_factory=Device)


@frozen(kw_only=True)
class Requirement:
    """Which versions of a package serve the artifact; `exact` excludes the others."""

    exact: str | None = None
    min: str | None = None
    max: str | None = None


@frozen(kw_only=True)
class Runtime:
    """What serves the artifact. `entry` is what the runtime opens, relative to the artifact; `.` is the folder."""

    engine: str = _checked(paths.text_problem)
    layout: str = _checked(paths.text_problem)
    entry: str = "."
    requires: Mapping[str, Requirement] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    """The command that serves or tries it; `{artifact}` stands for its folder."""
    settings: Mapping[str, Json] = field(default_factory=dict)


@frozen(kw_only=True)
class TensorSpec:
    """A named input or output; a dimension that varies is a name."""

    name: str = _checked(paths.text_problem)
    dtype: str = _checked(paths.text_problem)
    shape: tuple[int | str, ...] = ()


@frozen(kw_only=True)
class Interface:
    """What goes in and comes out. `limits` are integers by name, as in `context_length`."""

    task: str = _checked(paths.text_problem)
    kind: str = _checked(paths.text_problem)
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    limits: Mapping[str, int] = field(default_factory=dict)


@frozen(kw_only=True)
class File:
    """A file of the artifact; `size` in bytes."""

    path: str = _checked(paths.payload_problem)
    size: int = _checked(paths.size_problem)
    digest: str = _checked(paths.digest_problem)
    media_type: str = _checked(paths.text_problem)
    role: str = _checked(role_problem)


def threshold_problem(threshold: str) -> str | None:
    """Gates are finite decimals."""
    try:
        return None if math.isfinite(float(threshold)) else "is not a finite decimal"
    except ValueError:
        return "is not a decimal"


@frozen(kw_only=True)
class ManifestFacts:
    """What is known of an artifact before its files are listed."""

    name: str = _checked(paths.text_problem)
    version: str = _checked(paths.text_problem)
    build_key: str = _checked(paths.digest_problem)
    description: str = ""
    recipe: Mapping[str, Json]
    """The recipe of this target, resolved, with every default written out: the artifact can be rebuilt from it."""
    sources: tuple[Source, ...] = ()
    stages: tuple[StageRecord, ...] = ()
    target: Target
    runtime: Runtime
    interface: Interface
    precision: str = _checked(paths.text_problem)
    quantization: Mapping[str, Json] | None = None
    gates: Mapping[str, str | None] = field(default_factory=dict, metadata={"rule": threshold_problem})
    """Metric -> threshold as a decimal (see `decimal`); null where the recipe switched a gate off."""
    licenses: tuple[str, ...] = ()
    """SPDX expressions."""


@frozen(kw_only=True)
class Manifest(ManifestFacts):
    """manifest.json."""

    files: tuple[File, ...] = ()
    schema: Literal["urn:enginewright:artifact:v1"] = SCHEMA

    @property
    def size_bytes(self) -> int:
        """Size of all files, manifest.json and attestations excluded."""
        return sum(file.size for file in self.files)


def decimal(value: float) -> str:
    """The shortest decimal that reads back as the same double: `0.002`, `1e-09`. Refuses NaN and infinities."""
    if not math.isfinite(value):
        raise ValueError(f"{value} cannot be written as a decimal")
    return repr(float(value))


def freeze(value: Any) -> Json:
    """Plain JSON without floats: a float becomes `{"$float": decimal}`, a dataclass a dict, a tuple a list."""
    if isinstance(value, float):
        return {"$float": decimal(value)}
    if isinstance(value, Mapping):
        if "$float" in value and not is_float(value):
            raise ValueError("'$float' is how a manifest marks a float; it cannot be a name of your own")
        return {name: freeze(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [freeze(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: freeze(getattr(value, item.name)) for item in fields(value)}
    return value


def is_float(value: Json) -> bool:
    """Whether a JSON value is a float as a manifest writes it, in its shortest form."""
    if not (isinstance(value, Mapping) and value.keys() == {"$float"} and isinstance(value["$float"], str)):
        return False
    return threshold_problem(value["$float"]) is None and decimal(float(value["$float"])) == value["$float"]


def thaw(value: Json) -> Json:
    """The inverse of `freeze`, for lists, dicts and scalars."""
    if isinstance(value, Mapping):
        if is_float(value):
            return float(value["$float"])
        return {name: thaw(item) for name, item in value.items()}
    return [thaw(item) for item in value] if isinstance(value, list | tuple) else value


def manifest_bytes(manifest: Manifest) -> bytes:
    """manifest.json, byte for byte: canonical JSON (RFC 8785)."""
    return canonical(freeze(manifest))


def artifact_id(data: bytes) -> str:
    """The identity of the artifact whose manifest.json has these bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
