"""A CycloneDX 1.6 bill of materials of an artifact: the model it was made from, the tools that made it, what serves it.

Deterministic: no time, and a serial number that follows from the build key.
"""

from __future__ import annotations

import uuid
from typing import Any

from pipeline import __version__
from pipeline.artifact.attest import Attestation
from pipeline.artifact.manifest import ManifestFacts, Source

CYCLONEDX = "https://cyclonedx.org/bom"
VERSION = "1.6"


def sbom(facts: ManifestFacts) -> Attestation:
    """The bill as a predicate."""
    root = f"artifact:{facts.name}:{facts.target.name}"
    sources = [_source(each) for each in facts.sources]
    tools: dict[str, dict[str, Any]] = {}
    for stage in facts.stages:
        for name, version in stage.tools.items():
            made = _library(name, version)
            tools[made["bom-ref"]] = made
    served = []
    for name, wanted in facts.runtime.requires.items():
        version = wanted.exact or wanted.min or ""
        made = _library(name, version, required=True)
        served.append(made)
    components = [*sources, *(tools[ref] for ref in sorted(tools)), *served]
    about: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": root,
        "name": facts.name,
        "version": facts.version,
        "description": f"{facts.runtime.engine} {facts.precision} for {facts.target.name}",
    }
    if facts.licenses:
        about["licenses"] = _licenses(facts.licenses)
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, facts.build_key)}",
        "version": 1,
        "metadata": {
            "component": about,
            "tools": {"components": [{"type": "application", "name": "enginewright", "version": __version__}]},
        },
        "components": components,
        "dependencies": [
            {"ref": root, "dependsOn": sorted({each["bom-ref"] for each in components})},
        ],
    }
    return Attestation(CYCLONEDX, bom)


def _source(source: Source) -> dict[str, Any]:
    """A checkpoint or a data set, with its files."""
    made: dict[str, Any] = {
        "type": "machine-learning-model" if source.name == "model" else "data",
        "bom-ref": f"source:{source.name}",
        "name": source.uri,
        "components": [
            {
                "type": "file",
                "bom-ref": f"source:{source.name}:{file.path}",
                "name": file.path,
                "hashes": [{"alg": "SHA-256", "content": file.digest.removeprefix("sha256:")}],
            }
            for file in source.files
        ],
    }
    if source.revision:
        made["version"] = source.revision
        if source.uri.startswith("hf://"):
            name = source.uri.removeprefix("hf://").partition("@")[0]
            made["purl"] = f"pkg:huggingface/{name}@{source.revision}"
    if source.license:
        made["licenses"] = _licenses((source.license,))
    return made


def _library(name: str, version: str, *, required: bool = False) -> dict[str, Any]:
    kind = "runtime" if required else "tool"
    made = {"type": "library", "bom-ref": f"{kind}:{name}@{version}", "name": name}
    if version:
        made["version"] = version
        made["purl"] = f"pkg:pypi/{name}@{version}"
    made["scope"] = "required" if required else "excluded"
    return made


def _licenses(expressions: tuple[str, ...]) -> list[dict[str, Any]]:
    """One expression stands as such; several are named licences, as the schema has it."""
    if len(expressions) == 1:
        return [{"expression": expressions[0]}]
    return [{"license": {"name": each}} for each in expressions]
