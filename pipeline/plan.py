"""Recipe + hardware -> Plan, with a key for every step: pure, and all known before anything runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.digest import sha256_of
from pipeline.frozen import frozen
from pipeline.hardware import Device, Hardware, facts
from pipeline.plain import to_plain
from pipeline.size import Size
from pipeline.step import Stage, Step

Versions = Callable[[str, str], str]
"""(distribution, toolchain) -> version; raises UnavailableError when it is not installed."""


@frozen
class PlannedStep:
    """A step with its key. Steps of several targets with equal keys are one planned step."""

    name: str
    stage: Stage[Any]
    options: Any
    needs: Mapping[str, str]
    """Role -> key."""
    key: str
    key_text: Mapping[str, Any]
    targets: tuple[str, ...]
    memory_bytes: int = 0
    """What its process will hold at most, by the stage's own estimate; 0: not known."""
    device: Device | None = None
    """The accelerator on which alone it can run."""

    @property
    def label(self) -> str:
        """What a person calls it: `export`, or `cpu-int4/engine` when one target alone needs it."""
        return f"{self.targets[0]}/{self.name}" if len(self.targets) == 1 else self.name


@frozen
class Plan:
    """Steps in an order in which each comes after what it needs, and each target's keys by step name."""

    steps: tuple[PlannedStep, ...]
    targets: Mapping[str, Mapping[str, str]]

    def by_key(self) -> dict[str, PlannedStep]:
        """Key -> step."""
        return {step.key: step for step in self.steps}

    def chain(self, *keys: str) -> tuple[PlannedStep, ...]:
        """The steps of `keys` and all they rest on, in plan order."""
        wanted, by_key = set(keys), self.by_key()
        for step in reversed(self.steps):
            if step.key in wanted:
                wanted.update(by_key[step.key].needs.values())
        return tuple(step for step in self.steps if step.key in wanted)


def plan(targets: Mapping[str, tuple[Sequence[Step], Hardware]], versions: Versions, size: Size | None = None) -> Plan:
    """Give every step of every target its key, and share the steps whose keys are equal.

    `size` is that of the model: from it the stages say what memory they need.
    """
    versions = functools.cache(versions)  # reading a package's metadata takes a millisecond
    salt = os.environ.get("ENGINEWRIGHT_SALT", "")
    first: dict[str, tuple[Step, dict[str, Any], Hardware]] = {}
    users: dict[str, list[str]] = {}
    names: dict[str, dict[str, str]] = {}
    for target, (steps, hardware) in targets.items():
        keys = names[target] = {}
        for step in steps:
            text = {
                "kind": "step",
                "stage": step.stage.name,
                "version": step.stage.version,
                "options": to_plain(step.options, keyed=True),
                "needs": {role: keys[name] for role, name in step.needs.items()},
                "tools": {tool: versions(tool, step.stage.toolchain) for tool in step.stage.tools},
                "hardware": facts(hardware, step.stage.scope),
                "salt": salt,
            }
            key = keys[step.name] = f"{step.stage.name}-{sha256_of(text).removeprefix('sha256:')}"
            first.setdefault(key, (step, text, hardware))
            users.setdefault(key, []).append(target)
    planned = []
    for key, (step, text, machine) in first.items():
        common = (step.name, step.stage, step.options, text["needs"], key, text, tuple(users[key]))
        memory = step.stage.memory(step.options, size) if size else 0
        planned.append(PlannedStep(*common, memory_bytes=memory, device=_device(step, machine)))
    return Plan(tuple(planned), names)


def _device(step: Step, hardware: Hardware) -> Device | None:
    """What a step whose result depends on the exact device has to run on."""
    return hardware.devices[0] if step.stage.scope == "device" and hardware.devices else None
