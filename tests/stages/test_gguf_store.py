"""Layouts: Ollama's store and its manifest, a Modelfile, templates and parameters."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pipeline.errors import RecipeError
from pipeline.stages.gguf import store as gguf_store
from pipeline.stages.gguf.go import go_template, templates
from pipeline.stages.gguf.store import LAYER, address
from tests.conftest import ROOT
from tests.stages.ggufs import build

LLAMA = ROOT / "recipes" / "models" / "pydoc-llama"
GOLDEN = ROOT / "tests" / "golden" / "ollama-manifest.json"
DIGEST = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}
BLOB = {
    "type": "object",
    "required": ["mediaType", "digest", "size"],
    "properties": {"mediaType": {"type": "string"}, "digest": DIGEST, "size": {"type": "integer", "minimum": 1}},
    "additionalProperties": False,
}
LAYERS = ["model", "projector", "adapter", "template", "system", "license", "params", "messages"]
# The layout that Ollama's manifest package reads; see facts/gguf.md, section 2.
SCHEMA = {
    "type": "object",
    "required": ["schemaVersion", "mediaType", "config", "layers"],
    "additionalProperties": False,
    "properties": {
        "schemaVersion": {"const": 2},
        "mediaType": {"const": "application/vnd.docker.distribution.manifest.v2+json"},
        "config": {**BLOB, "properties": {**BLOB["properties"], "mediaType": {"const": gguf_store.CONFIG}}},  # type: ignore[dict-item]
        "layers": {
            "type": "array",
            "minItems": 1,
            "items": {
                **BLOB,
                "properties": {**BLOB["properties"], "mediaType": {"enum": [LAYER + name for name in LAYERS]}},  # type: ignore[dict-item]
            },
        },
    },
}
CONFIG = {
    "type": "object",
    "required": ["model_format", "model_family", "model_families", "model_type", "file_type", "architecture", "os"],
    "additionalProperties": False,
    "properties": {
        "model_format": {"const": "gguf"},
        "model_family": {"type": "string"},
        "model_families": {"type": "array", "items": {"type": "string"}},
        "model_type": {"type": "string", "pattern": r"^\d+(\.\d)?[KMBT]?$"},
        "file_type": {"type": "string"},
        "architecture": {"const": "amd64"},
        "os": {"const": "linux"},
    },
}
OPTIONS = {"layout": "ollama", "address": "me/pydoc:q8", "system": "Be brief.", "stop": ("<|end|>",)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(LLAMA, tmp_path_factory.mktemp("store") / "out", "Q8_0", parameters={"temperature": 0.5}, **OPTIONS)


def manifest(store: Path) -> Any:
    return json.loads((store / "manifests" / "registry.ollama.ai" / "me" / "pydoc" / "q8").read_bytes())


def test_the_store_is_what_ollama_reads(store: Path) -> None:
    found = manifest(store)
    jsonschema.validate(found, SCHEMA)
    blobs = {f"sha256:{file.name.removeprefix('sha256-')}": file for file in (store / "blobs").iterdir()}
    named = [found["config"], *found["layers"]]
    assert {each["digest"] for each in named} == set(blobs)
    for each in named:
        data = blobs[each["digest"]].read_bytes()
        assert each["size"] == len(data)
        assert each["digest"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
    jsonschema.validate(json.loads(blobs[found["config"]["digest"]].read_bytes()), CONFIG)
    by_kind = {each["mediaType"].removeprefix(LAYER): blobs[each["digest"]].read_bytes() for each in found["layers"]}
    assert by_kind["model"][:4] == b"GGUF"
    assert by_kind["system"] == b"Be brief."
    assert json.loads(by_kind["params"]) == {"num_ctx": 1024, "stop": ["<|end|>"], "temperature": 0.5}
    assert by_kind["license"].startswith(b"A. HISTORY OF THE SOFTWARE") or b"PYTHON" in by_kind["license"]
    assert "template" not in by_kind


def test_the_manifest_is_the_golden_one(store: Path) -> None:
    """All but the weights, whose bytes follow the versions of gguf and llama.cpp."""
    found = manifest(store)
    model = found["layers"][0]
    assert model["mediaType"] == f"{LAYER}model"
    model["digest"], model["size"] = "sha256:" + "0" * 64, 0
    assert found == json.loads(GOLDEN.read_text("utf-8"))


class Registry(http.server.BaseHTTPRequestHandler):
    """Docker's paths over the store, as it lies: nothing is made up but the paths."""

    def __init__(self, store: Path, *args: Any) -> None:
        self.store = store
        super().__init__(*args)

    def do_GET(self) -> None:
        _, version, *name, kind, last = self.path.split("/")
        place = {
            "manifests": self.store.joinpath("manifests", "registry.ollama.ai", *name, last),
            "blobs": self.store / "blobs" / last.replace(":", "-"),
        }[kind]
        ok = version == "v2" and place.is_file()
        self.send_response(200 if ok else 404)
        data = place.read_bytes() if ok else b""
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def registry(store: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Registry, store))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_registry_of_the_store_is_pulled_whole(registry: str, store: Path, tmp_path: Path) -> None:
    """The requests of `ollama pull`: the manifest by its tag, then every blob that it names by its digest."""

    def get(path: str) -> bytes:
        request = urllib.request.Request(registry + path, headers={"Accept": gguf_store.MANIFEST})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return bytes(answer.read())

    data = get("/v2/me/pydoc/manifests/q8")
    found = json.loads(data)
    for each in [found["config"], *found["layers"]]:
        blob = get(f"/v2/me/pydoc/blobs/{each['digest']}")
        assert f"sha256:{hashlib.sha256(blob).hexdigest()}" == each["digest"]
        (tmp_path / each["digest"].replace(":", "-")).write_bytes(blob)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in (store / "blobs").iterdir()}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("pydoc", ("registry.ollama.ai", "library", "pydoc", "latest")),
        ("me/pydoc:q4_k_m", ("registry.ollama.ai", "me", "pydoc", "q4_k_m")),
        ("models.example.org/me/pydoc:1.0", ("models.example.org", "me", "pydoc", "1.0")),
    ],
)
def test_an_address_has_four_parts(text: str, parts: tuple[str, ...]) -> None:
    assert address(text) == parts


@pytest.mark.parametrize(
    "text", ["", "a/b/c/d", "my.name/model", "model:", "../x", "a b", "-x", "x:y/z", "host:5000/a/b"]
)
def test_an_address_that_ollama_would_not_take_is_refused(text: str) -> None:
    if text == "model:":
        assert address(text)[3] == "latest"
        return
    with pytest.raises(RecipeError, match="is no name for Ollama"):
        address(text)


def test_a_modelfile_names_the_file_and_quotes_what_it_must(tmp_path: Path) -> None:
    out = build(LLAMA, tmp_path / "out", "F16", layout="modelfile", system='Say "yes".\nOr no.', stop=("<|end|>",))
    assert (out / "Modelfile").read_text("utf-8") == (
        'FROM ./model-F16.gguf\nPARAMETER num_ctx 1024\nPARAMETER stop "<|end|>"\nSYSTEM """Say "yes".\nOr no."""\n'
    )
    # What Ollama would take before the file, were the folder named.
    assert not list(out.glob("*.safetensors"))
    assert not (out / "config.json").exists()


@pytest.mark.parametrize("name", templates())
def test_a_known_template_is_told_by_what_it_writes(name: str, tmp_path: Path) -> None:
    entry = templates()[name]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    spelled = entry["jinja"].replace("for m in messages", "for message in messages").replace("m['", "message['")
    (tmp_path / "chat_template.jinja").write_text(spelled)
    assert go_template(tmp_path) == (entry["go"], tuple(entry["stop"]))


def test_another_template_is_refused_with_what_it_writes() -> None:
    with pytest.raises(RecipeError, match="like none of the known ones") as error:
        go_template(LLAMA)
    assert "<|user|>" in error.value.message
    assert "0.30" in error.value.hint


def test_parameters_that_ollama_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no parameter 'heat'"):
        build(LLAMA, tmp_path / "a", "F16", layout="ollama", address="x", parameters={"heat": 1.0})
    with pytest.raises(RecipeError, match=r"whole number, not 1\.5"):
        build(LLAMA, tmp_path / "b", "F16", layout="ollama", address="x", parameters={"num_ctx": 1.5})
