"""What the server answers, as OpenAPI says it; requests are checked against these very schemas."""

from __future__ import annotations

import json
from typing import Any

from pipeline.frozen import frozen
from pipeline.serve.problems import BadRequest
from pipeline.tables import DATA

_HINT = "see /openapi.json"


@frozen
class Limits:
    """What of the artifact and of the server's options enters the schemas."""

    model: str
    task: str
    vocab_size: int
    most_tokens: int
    """Of a prompt, or of an encoder's text."""
    most_rows: int
    """Choices or beams of one prompt."""


class Api:
    """The document at /openapi.json, and its checks."""

    def __init__(self, limits: Limits, *, guarded: bool) -> None:
        import jsonschema_rs
        import yaml

        text = (DATA / "openapi.yaml").read_text("utf-8")
        document = json.loads(json.dumps(yaml.safe_load(text)))  # anchors become values of their own
        schemas = document["components"]["schemas"]
        schemas["Model"]["enum"] = [limits.model]
        schemas["TokenId"]["maximum"] = limits.vocab_size - 1
        schemas["TokenIds"]["maxItems"] = limits.most_tokens
        for name in ("CompletionRequest", "ChatRequest"):
            for field in ("n", "beams"):
                schemas[name]["properties"][field]["maximum"] = limits.most_rows
            bias = schemas[name]["properties"]["logit_bias"]
            (value,) = bias["patternProperties"].values()
            bias["patternProperties"] = {f"^({below(limits.vocab_size)})$": value}
            _exclude(schemas[name])
        paths = document["paths"].items()
        document["paths"] = {path: told for path, told in paths if limits.task in told.pop("x-tasks", (limits.task,))}
        if guarded:
            document["security"] = [{"key": []}]
        self.document: dict[str, Any] = document
        self._validators = {
            name: jsonschema_rs.Draft202012Validator({**_lifted(schemas), "$ref": f"#/components/schemas/{name}"})
            for name in schemas
            if name.endswith("Request")
        }

    def check(self, name: str, body: Any) -> dict[str, Any]:
        """The body, if it is what the schema of this name says. Raises BadRequest naming the field."""
        error = next(self._validators[name].iter_errors(body), None)
        if error is None:
            found: dict[str, Any] = body
            return found
        place = [str(part) for part in error.instance_path]
        where = ".".join(place) or "the body"
        message = error.message if len(error.message) <= 300 else f"{error.message[:300]} ..."
        raise BadRequest(f"{where}: {message} ({_HINT})", param=place[0] if place else None)


def _exclude(request: dict[str, Any]) -> None:
    """What has no meaning together. Said in the schema, so that it is no surprise."""
    more = {"minimum": 2, "type": "integer"}
    others = {
        "temperature": {"type": "number", "exclusiveMinimum": 0},
        "n": more,
        "presence_penalty": {"type": "number", "not": {"const": 0}},
        "frequency_penalty": {"type": "number", "not": {"const": 0}},
        "logit_bias": {"type": "object", "minProperties": 1},
        "response_format": {"type": "object", "properties": {"type": {"not": {"const": "text"}}}},
        "stream": {"const": True},
        "logprobs": {"anyOf": [{"const": True}, {"type": "integer"}]},
    }
    request["allOf"] = [
        {"not": {"required": ["beams", field], "properties": {"beams": more, field: value}}}
        for field, value in others.items()
    ]
    if "top_logprobs" in request["properties"]:
        alone = {"top_logprobs": {"type": "integer"}, "logprobs": {"not": {"const": True}}}
        request["allOf"].append({"not": {"required": ["top_logprobs"], "properties": alone}})


def below(limit: int) -> str:
    """A regular expression for the whole numbers from 0 to below `limit`, as JSON writes them."""
    top = str(limit - 1)
    found = ["0"] if limit == 1 or len(top) > 1 else []
    if len(top) > 1:
        found.append(f"[1-9][0-9]{{0,{len(top) - 2}}}")
    for place, digit in enumerate(top):  # as many digits as the largest: equal so far, then smaller
        least = 1 if place == 0 and len(top) > 1 else 0
        if int(digit) > least:
            found.append(f"{top[:place]}[{least}-{int(digit) - 1}]" + "[0-9]" * (len(top) - place - 1))
    return "|".join([*found, top])


def _lifted(schemas: dict[str, Any]) -> dict[str, Any]:
    return {"components": {"schemas": schemas}}
