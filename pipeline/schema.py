"""JSON Schema of a recipe, for editors: the same declarations that the parser reads, in the schema's words."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pipeline.parse import TARGET_NAME
from pipeline.plain import Option, members, options_of, to_plain
from pipeline.recipe import Recipe, TargetOptions

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


def recipe_schema(runtimes: Mapping[str, type]) -> Schema:
    """The schema of a recipe whose targets may be built by `runtimes`: name -> Options.

    An editor that holds a recipe against it accepts whatever the parser accepts, but for text fields written as `true`
    or `false`. What only the parser sees: files that must exist, and checks across fields.
    """
    definitions: dict[str, Schema] = {}
    schema = {"$schema": DIALECT, **_section(Recipe, definitions)}
    schema["title"] = "Enginewright recipe"
    choices = []
    for name, options in sorted(runtimes.items()):
        section = _section(options, definitions)
        section["title"] = f"runtime: {name}"
        section["properties"]["runtime"] = {**section["properties"]["runtime"], "type": "string", "const": name}
        definitions[f"target.{name}"] = section
        choices.append({"$ref": f"#/$defs/target.{name}"})
    schema["properties"]["targets"] |= {
        "minProperties": 1,
        "propertyNames": {"pattern": _whole(TARGET_NAME)},
        "additionalProperties": {"oneOf": choices},
    }
    schema["$defs"] = dict(sorted(definitions.items()))
    return schema


def _section(cls: type, definitions: dict[str, Schema]) -> Schema:
    options = options_of(cls)
    return {
        "type": "object",
        "description": summary(cls),
        "properties": {option.name: _field(option, definitions) for option in options},
        "required": [option.name for option in options if option.required],
        "additionalProperties": False,
    }


def summary(cls: type) -> str:
    """The docstring of a section as one paragraph; empty where dataclass has only generated its signature."""
    doc = cls.__doc__ or ""
    return "" if doc.startswith(f"{cls.__name__}(") else " ".join(doc.split())


def _field(option: Option, definitions: dict[str, Schema]) -> Schema:
    metadata = option.metadata
    schema = _of(option.type, metadata, definitions)
    doc = metadata.get("doc", "")
    if metadata.get("unit"):
        doc += f" In {metadata['unit']}."
    if doc:
        schema["description"] = doc.strip()
    if metadata.get("example") and str in members(option.type):
        schema["examples"] = [metadata["example"]]
    if not option.required:
        schema["default"] = to_plain(option.default())
    return schema


def _of(tp: Any, metadata: Mapping[str, Any], definitions: dict[str, Schema]) -> Schema:
    """A type's schema. Raises TypeError for one that recipes do not have."""
    choices = members(tp)
    if len(choices) > 1:
        return {"anyOf": [_of(choice, metadata, definitions) for choice in choices]}
    origin, args = get_origin(tp), get_args(tp)
    if tp is Any:
        return {}
    if tp is types.NoneType:
        return {"type": "null"}
    if tp is bool:
        return {"type": "boolean"}
    if tp in (int, float):
        bounds = {"minimum": metadata.get("ge"), "maximum": metadata.get("le")}
        kind = "integer" if tp is int else "number"
        return {"type": kind, **{name: bound for name, bound in bounds.items() if bound is not None}}
    if tp is str:
        # The parser takes `version: 1.0` as the text it is; an editor sees a number there.
        pattern = metadata.get("pattern")
        return {"type": ["string", "number"], **({"pattern": _whole(pattern)} if pattern else {})}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple and args[-1:] == (...,):
        return {"type": "array", "items": _of(args[0], metadata, definitions)}
    if origin is tuple:
        items = [_of(arg, metadata, definitions) for arg in args]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if origin is dict or tp is dict:
        return {"type": "object", "additionalProperties": _of(args[1] if args else Any, metadata, definitions)}
    if tp is TargetOptions:
        return {}
    if dataclasses.is_dataclass(tp) and isinstance(tp, type):
        # Backends may call their sections alike: the module tells them apart.
        name = f"{tp.__module__.rpartition('.')[2]}.{tp.__name__}"
        if name not in definitions:
            definitions[name] = {}
            definitions[name] = _section(tp, definitions)
        return {"$ref": f"#/$defs/{name}"}
    raise TypeError(f"no schema for {tp}")


def _whole(pattern: str) -> str:
    return f"^(?:{pattern})$"
