"""What a file in an artifact is for, judged by its path, and the media type that follows from it."""

from __future__ import annotations

from fnmatch import fnmatchcase

ROLES: dict[str, str] = {
    # role -> media type of CNCF ModelPack 0.0.7, so that a registry can take each file as a layer of its own
    "engine": "application/vnd.cncf.model.weight.v1.raw",
    "graph": "application/vnd.cncf.model.weight.v1.raw",
    "weights": "application/vnd.cncf.model.weight.v1.raw",
    "tokenizer": "application/vnd.cncf.model.weight.config.v1.raw",
    "template": "application/vnd.cncf.model.weight.config.v1.raw",
    "config": "application/vnd.cncf.model.weight.config.v1.raw",
    "serving": "application/vnd.cncf.model.weight.config.v1.raw",
    "golden": "application/vnd.cncf.model.dataset.v1.raw",
    "doc": "application/vnd.cncf.model.doc.v1.raw",
    "license": "application/vnd.cncf.model.doc.v1.raw",
    "code": "application/vnd.cncf.model.code.v1.raw",
}

_PATTERNS: tuple[tuple[str, str], ...] = (
    # The first match counts; matched against the whole path, lower-case, then against its last segment.
    ("golden/*", "golden"),
    ("license", "license"),
    ("license[.-]*", "license"),
    ("licence", "license"),
    ("licence[.-]*", "license"),
    ("notice", "license"),
    ("notice[.-]*", "license"),
    ("copying", "license"),
    ("copying[.-]*", "license"),
    ("*.md", "doc"),
    ("*.onnx", "graph"),
    ("openvino_model.xml", "graph"),
    ("openvino_language_model.xml", "graph"),
    ("*tokenizer*.xml", "tokenizer"),
    ("*tokenizer*.bin", "tokenizer"),
    ("*.xml", "graph"),
    ("*.onnx.data", "weights"),
    ("*.onnx_data", "weights"),
    ("*.safetensors", "weights"),
    ("*.gguf", "weights"),
    ("blobs/sha256-*", "weights"),
    ("manifests/*", "serving"),
    ("*.bin", "weights"),
    ("*.weight", "weights"),
    ("*.plan", "engine"),
    ("*.engine", "engine"),
    ("*.blob", "engine"),
    ("chat_template*", "template"),
    ("*.jinja", "template"),
    ("*tokenizer*", "tokenizer"),
    ("vocab.*", "tokenizer"),
    ("merges.txt", "tokenizer"),
    ("special_tokens_map.json", "tokenizer"),
    ("added_tokens.json", "tokenizer"),
    ("spiece.model", "tokenizer"),
    ("genai_config.json", "serving"),
    ("config.pbtxt", "serving"),
    ("graph.pbtxt", "serving"),
    ("modelfile", "serving"),
    ("*.py", "code"),
    ("*.so", "code"),
)


def role_of(path: str) -> str:
    """The role of a file by its path; what matches nothing is configuration."""
    whole = path.lower()
    name = whole.rpartition("/")[2]
    return next((role for glob, role in _PATTERNS if fnmatchcase(whole, glob) or fnmatchcase(name, glob)), "config")


def role_problem(role: str) -> str | None:
    """A role must be one of ROLES."""
    return None if role in ROLES else f"is not a role (one of {', '.join(sorted(ROLES))})"
