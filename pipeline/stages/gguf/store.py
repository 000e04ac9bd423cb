"""Ollama's model store: content-addressed blobs, and a manifest that names them.

    blobs/sha256-<hex>                              raw bytes, mode 0644
    manifests/<host>/<namespace>/<model>/<tag>      Docker's manifest, version 2, as JSON

The manifest is also what a registry answers at /v2/<namespace>/<model>/manifests/<tag>, and the blobs what it answers
at /v2/<namespace>/<model>/blobs/sha256:<hex>: the folder behind those two paths is what `ollama pull` reads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.digest import sha256_file
from pipeline.errors import RecipeError
from pipeline.stages.gguf.families import Model

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.ollama.image."
HOST, NAMESPACE, TAG = "registry.ollama.ai", "library", "latest"
"""What Ollama takes where a name does not say it."""
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,349}")
_SIZES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def address(text: str) -> tuple[str, str, str, str]:
    """`[host/][namespace/]model[:tag]` -> its four parts. RecipeError for what Ollama would not take."""
    path, _, tag = text.partition(":")
    parts = path.split("/")
    if len(parts) > 3:
        raise RecipeError(f"{text!r} is no name for Ollama", hint="write [host/][namespace/]model[:tag]")
    host, namespace, model = [HOST, NAMESPACE][: 3 - len(parts)] + parts
    tag = tag or TAG
    if not _HOST.fullmatch(host) or "." in namespace or not all(_PART.fullmatch(p) for p in (namespace, model, tag)):
        raise RecipeError(
            f"{text!r} is no name for Ollama",
            hint="write [host/][namespace/]model[:tag] with letters, digits, _, . and -; no port, no . in namespaces",
        )
    return host, namespace, model, tag


def write_store(
    out: Path,
    file: Path,
    name: str,
    model: Model,
    quantization: Mapping[str, Any],
    texts: Mapping[str, str | None],
    parameters: Mapping[str, Any],
) -> str:
    """Move `file` into the store below `out` and write its layers, the manifest last. Returns the blob's path.

    `texts`: template (Go), system and license, each a layer if there is something in it.
    """
    blobs = out / "blobs"
    blobs.mkdir()
    digest = sha256_file(file)
    size = file.stat().st_size
    weights = blobs / digest.replace(":", "-")
    file.rename(weights)
    layers = [{"mediaType": f"{LAYER}model", "digest": digest, "size": size}]
    written = ((kind, texts.get(kind)) for kind in ("template", "system", "license"))
    layers += [_blob(blobs, text.encode(), f"{LAYER}{kind}") for kind, text in written if text]
    if parameters:
        layers.append(_blob(blobs, _json(parameters), f"{LAYER}params"))
    config = {
        "model_format": "gguf",
        "model_family": model.arch,
        "model_families": [model.arch],
        "model_type": _count(_parameters(weights)),
        "file_type": quantization["label"],
        "architecture": "amd64",
        "os": "linux",
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": _blob(blobs, _json(config), CONFIG),
        "layers": layers,
    }
    place = out.joinpath("manifests", *address(name))
    place.parent.mkdir(parents=True)
    place.write_bytes(_json(manifest) + b"\n")
    return weights.relative_to(out).as_posix()


def _blob(blobs: Path, data: bytes, kind: str) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    (blobs / f"sha256-{digest}").write_bytes(data)
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _parameters(file: Path) -> int:
    from pipeline.stages.gguf.file import read_tensors

    total = 0
    for tensor in read_tensors(file).values():
        count = 1
        for size in tensor.shape:
            count *= size
        total += count
    return total


def _count(number: int) -> str:
    """A number of parameters as Ollama writes it: `3.3M`, `8.0B`."""
    for size, letter in _SIZES:
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number)
