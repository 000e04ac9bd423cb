"""What a build knows of one target, as the manifest says it: nothing here differs from one run to the next."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.artifact.manifest import (
    Device,
    Interface,
    ManifestFacts,
    Requirement,
    Runtime,
    Source,
    SourceFile,
    StageRecord,
    Target,
    TensorSpec,
    decimal,
    freeze,
)
from pipeline.digest import FileDigest, sha256_of, sha256_tree
from pipeline.hardware import Hardware
from pipeline.parity.gates import Verdict
from pipeline.plain import to_plain
from pipeline.plan import Plan, PlannedStep
from pipeline.source import Source as Pinned
from pipeline.store import Entry
from pipeline.targets import Facts, Job, load


def manifest_facts(
    job: Job, name: str, plan: Plan, results: Mapping[str, Entry], verdicts: tuple[Verdict, ...], hardware: Hardware
) -> ManifestFacts:
    """The manifest of target `name`, from the plan, what the steps wrote, and the gates that were judged."""
    recipe, keys = job.recipe, plan.targets[name]
    options = recipe.targets[name]
    engine = json.loads((results[keys["engine"]].out / "engine.json").read_bytes())
    said = load(options.runtime).facts(engine, options, hardware)
    steps = list(plan.chain(keys["engine"]))
    own = {key: step for step, key in keys.items()}  # another target may call a shared step something else
    sources = tuple(_source(role, source, job) for role, source in _sources(job))
    interface = engine.get("interface") or {}
    decoder = engine.get("decoder") or {}
    return ManifestFacts(
        name=recipe.name,
        version=recipe.version,
        build_key=build_key(job, name, keys),
        description=recipe.package.description,
        recipe=resolved_recipe(job, name),
        sources=sources,
        stages=tuple(_stage(step, own, results[step.key]) for step in steps),
        target=Target(name=name, os=hardware.os, arch=hardware.arch, isa=said.isa, device=_device(said)),
        runtime=Runtime(
            engine=options.runtime,
            layout=said.layout,
            entry=said.entry,
            requires={
                **{package: Requirement(min=version) for package, version in said.requires.items()},
                **{package: Requirement(exact=version) for package, version in said.exact.items()},
            },
            command=said.command,
            settings=freeze(engine.get("settings") or {}),
        ),
        interface=Interface(
            task=job.task,
            kind=job.kind,
            inputs=_tensors(interface.get("inputs", ())),
            outputs=_tensors(interface.get("outputs", ())),
            limits={"context_length": decoder["context_length"]} if decoder.get("context_length") else {},
        ),
        precision=engine["precision"],
        quantization=freeze(engine.get("quantization")),
        gates={v.metric: None if v.threshold is None else decimal(v.threshold) for v in verdicts},
        licenses=(recipe.model.license,) if recipe.model.license else (),
    )


def build_key(job: Job, name: str, keys: Mapping[str, str]) -> str:
    """What was asked for: the digest of the resolved recipe and of the keys of what is packaged."""
    asked = {"recipe": resolved_recipe(job, name), "engine": keys["engine"], "golden": keys.get("golden", "")}
    return sha256_of(asked)


def resolved_recipe(job: Job, name: str) -> Any:
    """The recipe of one target, every default written out, as a manifest holds it."""
    return freeze(_recipe(job, name))


def _device(said: Facts) -> Device:
    return Device(kind=said.device, compute_capability=said.compute_capability, min_driver=said.min_driver or None)


def _sources(job: Job) -> list[tuple[str, Pinned]]:
    return [("model", job.sources.model), *sorted(job.sources.data.items())]


def _tensors(tensors: Any) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=t["name"], dtype=t["dtype"], shape=tuple(t["shape"])) for t in tensors)


def _stage(step: PlannedStep, names: Mapping[str, str], entry: Entry) -> StageRecord:
    return StageRecord(
        id=names[step.key],
        stage=step.stage.name,
        version=step.stage.version,
        key=step.key,
        needs={role: names[key] for role, key in step.needs.items()},
        outputs={file["path"]: file["digest"] for file in entry.files},
        tools=dict(step.key_text["tools"]),
        scope=step.stage.scope,
        toolchain=step.stage.toolchain,
        deterministic=step.stage.deterministic,
    )


def contents(source: Pinned) -> str:
    """One digest for a source's files: what a local folder is called in a manifest, wherever it lies."""
    return sha256_tree(FileDigest(file.path, file.size, file.digest) for file in source.files)


def _uri(source: Pinned) -> str:
    return source.uri if source.uri.startswith(("hf://", "package://")) else f"local:{contents(source)}"


def _source(role: str, source: Pinned, job: Job) -> Source:
    return Source(
        name=role,
        uri=_uri(source),
        revision=source.revision,
        license=(job.recipe.model.license or None) if role == "model" else None,
        files=tuple(SourceFile(path=f.path, size=f.size, digest=f.digest) for f in source.files),
    )


def _recipe(job: Job, name: str) -> dict[str, Any]:
    """The recipe of this target alone, every default written out; local paths give way to what they hold.

    So a renamed folder or a moved recipe makes the same artifact.
    """
    recipe = replace(job.recipe, targets={name: job.recipe.targets[name]}, toolchains={})
    plain: dict[str, Any] = to_plain(recipe)
    plain["model"]["source"] = _uri(job.sources.model)
    plain["model"]["task"] = job.task
    data = job.sources.data
    if plain["calibration"] and "calibration" in data:
        plain["calibration"]["path"] = _uri(data["calibration"])
    if plain["parity"]["data"] and "parity-data" in data:
        plain["parity"]["data"]["path"] = _uri(data["parity-data"])
    if plain["parity"]["prompts"] and "prompts" in data:
        plain["parity"]["prompts"] = _uri(data["prompts"])
    return plain


def license_file(results: Mapping[str, Entry], keys: Mapping[str, str]) -> Path | None:
    """The licence text that came with the model, if one did."""
    folder = results[keys["model"]].out
    found = sorted(p for p in folder.iterdir() if p.name.lower().startswith("license") and p.is_file())
    return found[0] if found else None
