"""The commands in this process, and artifacts of two targets to move about."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.artifact.manifest import Device, Requirement, Runtime, Target
from pipeline.cli.main import run
from tests.artifact.helpers import build, facts, parity

GPU = Target(name="cuda-sm90", device=Device(kind="cuda", compute_capability=("9.0",)))
WEIGHTS = bytes(range(256)) * 12_000
"""3 MB."""


@dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one document."""
        return json.loads(self.out)


def enginewright(*argv: object) -> Done:
    """`enginewright ...`, as a user would say it, without a process of its own."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(word) for word in argv])
    return Done(code, out.getvalue(), err.getvalue())


def ok(*argv: object) -> Done:
    """The same; it must go well."""
    done = enginewright(*argv)
    assert done.code == 0, done.err
    return done


def refused(done: Done, code: int, *words: str) -> None:
    """It failed in the way that was meant."""
    assert done.code == code, f"exit code {done.code}\n{done.out}\n{done.err}"
    for word in words:
        assert word in done.err, done.err
    assert "Traceback" not in done.err


def artifacts(place: Path, version: str = "1.0.0", weights: bytes = WEIGHTS) -> Path:
    """`<place>/tiny` with the targets `cpu` (runs here, proved) and `cuda-sm90` (deferred)."""
    engine = place / "engine"
    if not engine.exists():
        (engine / "extra").mkdir(parents=True)
        (engine / "model.onnx").write_bytes(weights)
        (engine / "tokenizer.json").write_text('{"version": "1.0"}')
        (engine / "extra" / "note.json").write_text('{"é": 1}')
    runtime = replace(facts().runtime, requires={"onnxruntime": Requirement(min="1.0")})
    cpu = facts(version=version, target=Target(name="cpu"), runtime=runtime)
    made = build(place, manifest_facts=cpu, destination=place / "tiny" / "cpu", link="copy")
    gpu = facts(version=version, target=GPU, runtime=Runtime(engine="onnxruntime", layout="genai"))
    build(
        place,
        manifest_facts=gpu,
        destination=place / "tiny" / "cuda-sm90",
        link="copy",
        attestations={"parity": parity("deferred", passed=(), metrics={})},
    )
    return made.path.parent


def clean(out: Path) -> None:
    """Nothing of a pull that failed is where artifacts are, finished or not."""
    left = [path for path in out.rglob("*") if path.is_file() and ".registry" not in path.parts]
    assert [path for path in left if not (path.name.endswith(".lock") and path.stat().st_size == 0)] == []
