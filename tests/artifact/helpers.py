"""A small fake engine folder and the facts of an artifact, for tests of packaging."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.artifact import attest
from pipeline.artifact.attest import Attestation, ParityResult
from pipeline.artifact.manifest import (
    Interface,
    ManifestFacts,
    Requirement,
    Runtime,
    Source,
    SourceFile,
    StageRecord,
    Target,
    TensorSpec,
)
from pipeline.artifact.package import Assembled, assemble

DIGEST = "sha256:" + "ab" * 32


def write_engine(folder: Path, weights: bytes = b"weights " * 500) -> Path:
    """An engine step's folder: graph, tokenizer, configuration, and a file in a folder of its own."""
    (folder / "extra").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(weights)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "genai_config.json").write_text("{}")
    (folder / "extra" / "note.json").write_text('{"é": 1}')
    return folder


def write_golden(folder: Path) -> Path:
    """A golden folder as far as packaging sees one."""
    folder.mkdir(parents=True)
    (folder / "golden.json").write_text("{}")
    (folder / "inputs.input_ids.npy").write_bytes(b"\x93NUMPY" + bytes(58))
    return folder


def facts(**changes: Any) -> ManifestFacts:
    """Facts of a small decoder."""
    tensors = (TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence")),)
    made = ManifestFacts(
        name="tiny",
        version="1.0.0",
        build_key=DIGEST,
        description="A test.",
        recipe={"name": "tiny", "targets": {"cpu": {"quantize": {"scale": 0.002, "big": 1e-09}}}},
        sources=(
            Source(
                name="model",
                uri="hf://org/tiny",
                revision="c" * 40,
                license="Apache-2.0",
                files=(SourceFile(path="model.safetensors", size=10, digest=DIGEST),),
            ),
        ),
        stages=(
            StageRecord(id="export", stage="onnx.fused", version=1, key="onnx.fused-00", tools={"onnx": "1.22.0"}),
            StageRecord(id="engine", stage="ort.build", version=2, key="ort.build-00", needs={"export": "export"}),
        ),
        target=Target(name="cpu"),
        runtime=Runtime(
            engine="onnxruntime",
            layout="genai",
            requires={"onnxruntime": Requirement(min="1.30")},
            command=("enginewright", "generate", "{artifact}"),
        ),
        interface=Interface(task="text-generation", kind="decoder", inputs=tensors, limits={"context_length": 64}),
        precision="int4",
        quantization={"method": "rtn", "group_size": 32, "ratio": 0.5},
        gates={"kld_mean": "0.002", "kld_max": None},
        licenses=("Apache-2.0",),
    )
    return replace(made, **changes)


def parity(verdict: Any = "passed", **changes: Any) -> Attestation:
    """A parity attestation as the build writes it."""
    result = ParityResult(verdict=verdict, metrics={"kld_mean": 0.001}, passed=("kld_mean",), samples=8)
    return attest.parity(replace(result, **changes), facts().gates, DIGEST)


def build(tmp: Path, **changes: Any) -> Assembled:
    """Assemble the fake engine under `tmp` as `tmp/out/tiny`."""
    engine = tmp / "engine" if (tmp / "engine").exists() else write_engine(tmp / "engine")
    golden = tmp / "golden" if (tmp / "golden").exists() else write_golden(tmp / "golden")
    arguments: dict[str, Any] = {
        "golden_dir": golden,
        "manifest_facts": facts(),
        "destination": tmp / "out" / "tiny",
        "attestations": {"parity": parity()},
    }
    return assemble(engine, **{**arguments, **changes})


def edit_manifest(artifact: Path, **changes: Any) -> None:
    """Change top-level fields of a manifest.json in place, keeping it canonical."""
    from pipeline.digest import canonical

    path = artifact / "manifest.json"
    value = {**json.loads(path.read_bytes()), **changes}
    rewrite(path, canonical(value))


def rewrite(path: Path, data: bytes) -> None:
    """Give a read-only file a new content under a new inode."""
    path.unlink()
    path.write_bytes(data)


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Path -> (inode, mtime, bytes), for "nothing was written" assertions."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
