"""What is measured: for each tool the same job as its own commands, phase by phase in one workspace.

A job has one or more phases. The phases of one job share the tool's cache, so that `warm` after `cold` is a second run
of the same command. Peers run with what their documentation says, and with their parity checks as they come.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS, OLIVE, OPTIMUM, GENAI = "Enginewright", "Olive", "Optimum", "GenAI builder"
TOOLS = (OURS, OLIVE, OPTIMUM, GENAI)

Command = tuple[str, ...]
Targets = dict[str, dict[str, object]]
"""`targets:` of a recipe."""

# Another kind of int8 for the same encoder: what `edit` changes, and the third target of `three`.
OTHER_INT8: dict[str, object] = {"precision": "int8", "int8": {"embeddings": False}}
EDIT_OF_ENCODER = "targets.cpu-int8.int8.embeddings=false"


@dataclass(frozen=True)
class Phase:
    """A named list of commands."""

    name: str
    commands: tuple[Command, ...]
    folder: str = ""
    """Within the workspace: where the commands run, with a cache of its own. Disk is measured there."""


@dataclass(frozen=True)
class Attempt:
    """One tool's way to do a job, in a workspace that is new for every repetition."""

    tool: str
    phases: tuple[Phase, ...]
    outputs: tuple[str, ...] = ()
    """Folders that hold the finished models, where a phase runs."""


@dataclass(frozen=True)
class Job:
    """The same work by every tool that can do it."""

    id: str
    title: str
    attempts: Callable[[Path], tuple[Attempt, ...]]
    """Given the workspace's parent; a tool's workspace is below it, by its name."""
    note: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Tools that cannot do it, with the reason."""


def workspace(parent: Path, tool: str) -> Path:
    """Where a tool works in one repetition."""
    return parent / tool.lower().replace(" ", "-")


@dataclass(frozen=True)
class Interpreters:
    """Where each tool is installed."""

    ours: Path
    olive: Path
    optimum: Path

    def tool(self, python: Path, name: str) -> str:
        """A console script beside an interpreter."""
        return str(python.parent / name)

    def build(self, recipe: Path, *more: str) -> Command:
        """`build` with everything inside the workspace."""
        script = self.tool(self.ours, "build")
        return (script, str(recipe), "--quiet", "--out", "out", "--cache", "cache", "--events", "events.ndjson", *more)

    def draft(self, recipe: Path) -> Phase:
        """The engines alone: the work that the peers do, too."""
        command = (self.tool(self.ours, "enginewright"), "draft", str(recipe), "--quiet", "--out", "out")
        return Phase("draft", ((*command, "--cache", "cache"),), "draft")

    def ours_from_nothing(self, recipe: Path) -> Attempt:
        """A draft, a build, the same build again, and what it leaves with `--lean`."""
        again = self.build(recipe)
        runs = (("cold", again), ("warm", again), ("lean", self.build(recipe, "--lean")))
        built = (Phase(name, (command,), "build") for name, command in runs)
        return Attempt(OURS, (self.draft(recipe), *built), ("out",))

    def olive_run(self, config: Path) -> Command:
        return (self.tool(self.olive, "olive"), "run", "--config", str(config))

    def optimum_cli(self, *arguments: str) -> Command:
        return (self.tool(self.optimum, "optimum-cli"), *arguments)


def olive_config(
    path: Path, *, model: Path, task: str, model_type: str, passes: Mapping[str, Mapping[str, Any]], out: str
) -> Path:
    """Write a workflow for `olive run`: export, fuse, quantize, for the CPU; without an evaluator."""
    conversion: dict[str, Any] = {"type": "OnnxConversion", "target_opset": 17}
    if task == "feature-extraction":  # its default exporter fails here: forward() got two values for 'use_cache'
        conversion = {"type": "OnnxConversion", "target_opset": 20, "use_dynamo_exporter": True}
    content = {
        "input_model": {"type": "HfModel", "model_path": str(model), "task": task},
        "systems": {
            "cpu": {
                "type": "LocalSystem",
                "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
            }
        },
        "passes": {
            "conversion": conversion,
            "fusion": {"type": "OrtTransformersOptimization", "model_type": model_type},
            **passes,
        },
        "target": "cpu",
        "cache_dir": "cache",
        "output_dir": out,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return path


def start(tools: Interpreters) -> Job:
    """How long until a command line answers."""

    def attempts(parent: Path) -> tuple[Attempt, ...]:
        return (
            Attempt(OURS, (Phase("help", ((tools.tool(tools.ours, "build"), "--help"),)),)),
            Attempt(OLIVE, (Phase("help", ((tools.tool(tools.olive, "olive"), "--help"),)),)),
            Attempt(OPTIMUM, (Phase("help", (tools.optimum_cli("export", "onnx", "--help"),)),)),
            Attempt(GENAI, (Phase("help", ((str(tools.ours), "-m", "onnxruntime_genai.models.builder", "--help"),)),)),
        )

    note = "The help of GenAI's builder 0.18.0 ends in an error (a stray `%`), after it has imported torch."
    return Job("start", "Start of the command line", attempts, note)


def encoder(tools: Interpreters, home: Path, name: str, model: Path, task: str, recipe: Path) -> Job:
    """A BERT from its checkpoint to int8, again without a change, and with the last step changed."""

    def attempts(parent: Path) -> tuple[Attempt, ...]:
        first = olive_config(
            home / "inputs" / f"olive-{name}.json",
            model=model,
            task=task,
            model_type="bert",
            passes={"quantization": {"type": "OnnxDynamicQuantization"}},
            out="out",
        )
        changed = olive_config(
            home / "inputs" / f"olive-{name}-changed.json",
            model=model,
            task=task,
            model_type="bert",
            passes={"quantization": {"type": "OnnxDynamicQuantization", "per_channel": True}},
            out="out",
        )
        export = tools.optimum_cli("export", "onnx", "-m", str(model), "--task", task, "fp32")
        quantize = tools.optimum_cli("onnxruntime", "quantize", "--onnx_model", "fp32", "--avx2", "-o", "out")
        again = (*quantize, "--per_channel")
        edit = tools.build(recipe, "--set", EDIT_OF_ENCODER)
        return (
            Attempt(
                OURS,
                (
                    tools.draft(recipe),
                    Phase("cold", (tools.build(recipe),), "build"),
                    Phase("warm", (tools.build(recipe),), "build"),
                    Phase("edit", (edit,), "build"),
                    Phase("lean", (tools.build(recipe, "--lean"),), "lean"),
                ),
                ("out",),
            ),
            Attempt(
                OLIVE,
                (
                    Phase("cold", (tools.olive_run(first),)),
                    Phase("warm", (tools.olive_run(first),)),
                    Phase("edit", (tools.olive_run(changed),)),
                ),
                ("out",),
            ),
            Attempt(
                OPTIMUM,
                (Phase("cold", (export, quantize)), Phase("warm", (export, quantize)), Phase("edit", (again,))),
                ("out",),
            ),
        )

    return Job(
        name,
        f"{name}: fp32 checkpoint to int8",
        attempts,
        missing={GENAI: "builds decoders only"},
    )


def three_targets(tools: Interpreters, home: Path, model: Path, task: str, recipe: Path) -> Job:
    """fp32 and two ways of int8 from one export."""

    def attempts(parent: Path) -> tuple[Attempt, ...]:
        ways: dict[str, dict[str, dict[str, Any]]] = {
            "a": {},
            "b": {"quantization": {"type": "OnnxDynamicQuantization"}},
            "c": {"quantization": {"type": "OnnxDynamicQuantization", "per_channel": True}},
        }
        configs = [
            olive_config(
                home / "inputs" / f"olive-three-{key}.json",
                model=model,
                task=task,
                model_type="bert",
                passes=passes,
                out=f"out-{key}",
            )
            for key, passes in ways.items()
        ]
        quantize = tools.optimum_cli("onnxruntime", "quantize", "--onnx_model", "out-a", "--avx2")
        return (
            tools.ours_from_nothing(recipe),
            Attempt(
                OLIVE,
                (Phase("cold", tuple(tools.olive_run(config) for config in configs)),),
                ("out-a", "out-b", "out-c"),
            ),
            Attempt(
                OPTIMUM,
                (
                    Phase(
                        "cold",
                        (
                            tools.optimum_cli("export", "onnx", "-m", str(model), "--task", task, "out-a"),
                            (*quantize, "-o", "out-b"),
                            (*quantize, "--per_channel", "-o", "out-c"),
                        ),
                    ),
                ),
                ("out-a", "out-b", "out-c"),
            ),
        )

    return Job(
        "three",
        "Three targets of one model: fp32 and two kinds of int8",
        attempts,
        missing={GENAI: "builds decoders only"},
        note="Olive 0.13.0 runs one list of passes a command; the three commands share its cache.",
    )


def decoder(tools: Interpreters, name: str, precision: str, model: Path, recipe: Path) -> Job:
    """A language model with its KV cache, from a cold cache."""

    def attempts(parent: Path) -> tuple[Attempt, ...]:
        olive = (tools.tool(tools.olive, "olive"), "capture-onnx-graph", "-m", str(model), "--use_model_builder")
        genai = (str(tools.ours), "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", "out")
        found = [
            tools.ours_from_nothing(recipe),
            Attempt(OLIVE, (Phase("cold", ((*olive, "--precision", precision, "-o", "out"),)),), ("out",)),
            Attempt(GENAI, (Phase("cold", ((*genai, "-p", precision, "-e", "cpu", "-c", "cache"),)),), ("out",)),
        ]
        if precision == "fp32":
            export = tools.optimum_cli("export", "onnx", "-m", str(model), "--task", "text-generation-with-past", "out")
            found.append(Attempt(OPTIMUM, (Phase("cold", (export,)),), ("out",)))
        return tuple(found)

    return Job(
        f"{name}-{precision}",
        f"{name}: {precision} decoder",
        attempts,
        missing={} if precision == "fp32" else {OPTIMUM: "`optimum-cli export onnx` has no int4"},
    )
