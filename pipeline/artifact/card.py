"""The generated README.md and LICENSE of an artifact: what it is, how to run it. No number that a run may change."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from pipeline.artifact.manifest import ManifestFacts

_HUB_LICENSES = re.compile(r"[A-Za-z0-9.+-]+")


def readme(facts: ManifestFacts, *, license_there: bool) -> bytes:
    """The card: Markdown with the front matter that Hugging Face reads. `license_there`: LICENSE lies beside it."""
    front = [f"pipeline_tag: {_yaml(facts.interface.task)}"]
    if len(facts.licenses) == 1 and _HUB_LICENSES.fullmatch(facts.licenses[0]):
        front.insert(0, f"license: {_yaml(facts.licenses[0].lower())}")
    front += [
        f"base_model: {_yaml(source.uri.removeprefix('hf://').partition('@')[0])}"
        for source in facts.sources
        if source.uri.startswith("hf://") and source.name == "model"
    ]
    tags = ["enginewright", facts.runtime.engine, facts.precision]
    lines = ["---", *front, "tags:", *(f"- {_yaml(tag)}" for tag in tags), "---", ""]
    lines += [f"# {facts.name} {facts.version} for {facts.target.name}", ""]
    if facts.description:
        lines += [facts.description, ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in _rows(facts)), ""]
    lines += ["## Run", ""]
    if facts.runtime.command:
        lines += ["```sh", command(facts, "."), "```", ""]
    else:
        lines += [f"Open `{facts.runtime.entry}` with {facts.runtime.engine}.", ""]
    lines += ["## Check", "", "```sh"]
    lines += ["enginewright verify .          # every file against manifest.json"]
    lines += ["enginewright verify --run .    # and the golden inputs on this machine, against the gates", "```", ""]
    lines += ["`manifest.json` says where this came from and how it was built; `.attest/` holds what was measured.", ""]
    lines += ["## Licence", "", _license_sentence(facts, license_there), ""]
    return "\n".join(lines).encode()


def license_text(facts: ManifestFacts) -> bytes | None:
    """A LICENSE that states the SPDX expressions; None when no licence is known."""
    if not facts.licenses:
        return None
    lines = [f"SPDX-License-Identifier: {expression}" for expression in facts.licenses]
    lines += ["", "The texts of these licences are at https://spdx.org/licenses/."]
    return ("\n".join(lines) + "\n").encode()


def command(facts: ManifestFacts, folder: str) -> str:
    """The command that serves or tries the artifact in `folder`, as a shell takes it; empty if there is none."""
    return shlex.join(word.replace("{artifact}", folder) for word in facts.runtime.command)


def _rows(facts: ManifestFacts) -> list[tuple[str, str]]:
    device = facts.target.device
    machine = " ".join((facts.target.os, facts.target.arch, device.kind, *device.compute_capability, *facts.target.isa))
    rows = [
        ("task", facts.interface.task),
        ("precision", facts.precision),
        ("runtime", facts.runtime.engine),
        ("machine", machine),
        *((f"needs {name}", versions(need.exact, need.min, need.max)) for name, need in _needs(facts)),
        *((f"built from {source.name}", _source(source.uri, source.revision)) for source in facts.sources),
    ]
    if facts.quantization:
        method = facts.quantization.get("method")
        rows.insert(2, ("quantization", str(method) if method else "see manifest.json"))
    return rows


def _needs(facts: ManifestFacts) -> list[tuple[str, Any]]:
    return sorted(facts.runtime.requires.items())


def versions(exact: str | None, minimum: str | None, maximum: str | None) -> str:
    """A requirement as people write it: `==1.2`, `>=1.0 <=2.0`, `any version`."""
    if exact:
        return f"=={exact}"
    return " ".join([f">={minimum}"] * bool(minimum) + [f"<={maximum}"] * bool(maximum)) or "any version"


def _source(uri: str, revision: str | None) -> str:
    return f"{uri} at {revision}" if revision and f"@{revision}" not in uri else uri


def _license_sentence(facts: ManifestFacts, license_there: bool) -> str:
    if facts.licenses:
        return f"{', '.join(facts.licenses)} (see LICENSE)."
    if license_there:
        return "See LICENSE, which came with the model."
    return "The model came with none, and its recipe states none. Ask its publisher before you pass it on."


def _yaml(text: str) -> str:
    """A YAML scalar: plain where that is safe, quoted elsewhere."""
    return text if re.fullmatch(r"[A-Za-z][A-Za-z0-9./_-]*", text) else json.dumps(text, ensure_ascii=False)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
