"""Run a plan on a Ray cluster: each missing step is a task, the same child process as here, on a node that suits.

Results travel through the shared store, beside which each node has a store of its own; or through the store itself,
where every node sees it under the same path. Ray starts a task again when its node or its process is lost; a result is
put in place whole and once, so that a step that ran twice does no harm.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import __version__
from pipeline import hardware as machines
from pipeline.errors import BY_EXIT_CODE, StageError, UnavailableError
from pipeline.hardware import Device
from pipeline.plain import to_plain
from pipeline.plan import Plan, PlannedStep
from pipeline.run.budget import Budget
from pipeline.run.child import reference
from pipeline.run.node import TRAVEL, perform
from pipeline.run.once import Beyond, Event
from pipeline.run.queue import Queue
from pipeline.store import Entry, Store

RETRIES = 5
"""How often a task is started again after its node or process was lost: spot machines go in groups."""
CPUS = 4
"""Cores that a step asks for, and threads that it gets, where the smallest node has as many."""
OBJECTS_BYTES = 100 << 20
"""Ray's own object store on a cluster that we start: no result goes through it."""
SPEAKS_FOR = "compute_capability:"
"""A node's resource `compute_capability:9.0` says what its GPU is, where the name of the type does not."""


@dataclass
class RayRunner:
    """`address` is empty for a cluster on this machine (or $RAY_ADDRESS), or `ray://host:port`."""

    store: Store
    on_event: Callable[[Event], None]
    toolchains: Mapping[str, str]
    budget: Budget
    address: str = ""
    beyond: Beyond | None = None
    shared: Mapping[str, Any] | None = None
    """What `beyond` is, for the nodes: the arguments of `node.SHARED`."""

    def run(self, plan: Plan) -> dict[str, Entry]:
        """Results by key. The first failure ends the run: tasks under way are cancelled, finished steps are kept.

        Raises UnavailableError, before any step runs, when no node has the device that a missing step asks for.
        """
        done = {step.key: entry for step in plan.steps if (entry := self.store.get(step.key))}
        for step in plan.steps:
            if entry := done.get(step.key):
                self.on_event({**_said("hit", step), "size_bytes": entry.size_bytes})
        for step in plan.steps:
            if step.key not in done and (entry := self._beyond(step)):
                done[step.key] = entry
                self.on_event({**_said("hit", step), "size_bytes": entry.size_bytes, "shared": True})
        if len(done) == len(plan.steps):
            return done
        for step in plan.steps:
            if self.beyond and (entry := done.get(step.key)):  # the nodes look for it there
                with self.store.locked(step.key):
                    done[step.key] = self.beyond.offer(entry, self.store, self._telling(step))
        with self._cluster() as ray:
            asked = {step.key: self._resources(step, ray.nodes()) for step in plan.steps if step.key not in done}
            queue, running = Queue(plan), dict[Any, PlannedStep]()
            task = ray.remote(perform)
            try:
                while len(done) < len(plan.steps) or running:
                    while ready := queue.take(lambda _: True):
                        if ready.key in done:
                            queue.finish(ready.key)
                        else:
                            told = task.options(max_retries=RETRIES, name=ready.label, **asked[ready.key])
                            running[told.remote(self._job(ready, int(asked[ready.key]["num_cpus"])))] = ready
                    if not running:
                        continue
                    ended, _ = ray.wait(list(running), num_returns=1)
                    for each in ended:
                        step = running.pop(each)
                        done[step.key] = self._take(step, ray, each)
                        queue.finish(step.key)
            except BaseException:
                for each in running:
                    with contextlib.suppress(Exception):
                        ray.cancel(each, force=True)
                raise
        return done

    def _beyond(self, step: PlannedStep) -> Entry | None:
        """A result that another builder, or a node, has put into the shared store."""
        if self.beyond is None:
            return None
        with self.store.locked(step.key):
            return self.store.get(step.key) or self.beyond.fetch(step.key, self.store, self._telling(step))

    def _telling(self, step: PlannedStep) -> Callable[[str], None]:
        return lambda note: self.on_event({**_said("note", step), "note": note})

    @contextlib.contextmanager
    def _cluster(self) -> Iterator[Any]:
        """Ray, connected. A cluster that this started ends with it."""
        # Read by Ray when it is imported, and by the processes that it starts.
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0"}
        for name, value in quiet.items():
            os.environ.setdefault(name, value)
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            import ray
        except ImportError:
            raise UnavailableError("--on ray needs Ray", hint="pip install 'enginewright[ray]'") from None
        found = self.address or os.environ.get("RAY_ADDRESS", "")
        alone: dict[str, Any] = {} if found else {"num_cpus": self.budget.cores, "object_store_memory": OBJECTS_BYTES}
        if not found and self.budget.memory_bytes:
            alone["_memory"] = self.budget.memory_bytes
        try:
            ray.init(found or "local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", **alone)
        except Exception as error:
            raise UnavailableError(
                f"no Ray cluster answers at {found or 'this machine'}: {type(error).__name__}: {error}",
                hint="`ray start --head` prints the address; `--on ray` without one starts a cluster here. "
                "RAY_AUTH_MODE must be the cluster's: token, or disabled",
            ) from error
        try:
            yield ray
        finally:
            ray.shutdown()

    def _resources(self, step: PlannedStep, nodes: list[dict[str, Any]]) -> dict[str, Any]:
        """What a task asks of a node, as Ray's options."""
        offers = [node["Resources"] for node in nodes if node["Alive"]]
        cores = min((int(offer["CPU"]) for offer in offers if offer.get("CPU", 0) >= 1), default=1)
        asked: dict[str, Any] = {"num_cpus": min(CPUS, cores)}
        largest = max((offer.get("memory", 0) for offer in offers), default=0)
        if step.memory_bytes:
            if step.memory_bytes > largest:
                raise UnavailableError(
                    f"{step.label} needs about {step.memory_bytes / 1e9:.1f} GB of memory, and the largest node of the "
                    f"cluster offers {largest / 1e9:.1f} GB",
                    hint="add a node with more memory, or tell Ray of it with `ray start --memory BYTES`",
                )
            asked["memory"] = step.memory_bytes
        if step.device:
            asked |= {"num_gpus": 1, "resources": {_kind(step, step.device, offers): 0.001}}
        return asked

    def _job(self, step: PlannedStep, threads: int) -> dict[str, Any]:
        return {
            "name": step.name,
            "stage": reference(step.stage),
            "options_type": f"{type(step.options).__module__}:{type(step.options).__qualname__}",
            "options": to_plain(step.options),
            "needs": dict(step.needs),
            "key": step.key,
            "key_text": dict(step.key_text),
            "targets": list(step.targets),
            "memory_bytes": step.memory_bytes,
            "store": "" if self.shared else str(self.store.root),
            "shared": dict(self.shared) if self.shared else None,
            "toolchains": dict(self.toolchains),
            "threads": threads,
            "version": __version__,
        }

    def _take(self, step: PlannedStep, ray: Any, ended: Any) -> Entry:
        """The result of a task that has ended, or its error."""
        try:
            said = ray.get(ended)
        except ray.exceptions.RayError as error:
            raise StageError(
                f"{step.label}: the cluster lost it {RETRIES + 1} times: {type(error).__name__}: {error}",
                hint="`ray status` and `ray list nodes` show what the nodes are at",
            ) from error
        for event in said["events"]:
            self.on_event(event)
        if wrong := said.get("error"):
            kind = BY_EXIT_CODE.get(int(wrong["exit_code"]), StageError)
            raise kind(f"{wrong['message']} (on {said['node']})", hint=wrong["hint"])
        entry = self.store.get(step.key) or self._beyond(step)
        if entry is None:
            where = "the shared store" if self.shared else f"the store at {self.store.root}"
            raise StageError(f"{step.label}: {said['node']} made it, and it is not in {where}", hint=TRAVEL)
        return entry


def _said(event: str, step: PlannedStep) -> dict[str, Any]:
    return {"event": event, "step": step.label, "key": step.key}


def _kind(step: PlannedStep, device: Device, offers: list[dict[str, float]]) -> str:
    """The resource of the nodes whose GPU has the compute capability that a step asks for."""
    fitting = [f"{SPEAKS_FOR}{device.compute_capability}"]
    fitting += [f"accelerator_type:{name}" for name in accelerators(device.compute_capability)]
    for name in fitting:
        if any(offer.get(name) and offer.get("GPU") for offer in offers):
            return name
    there = sorted({name for offer in offers for name in offer if name.startswith(("accelerator_type:", SPEAKS_FOR))})
    raise UnavailableError(
        f"{step.label} needs a GPU of compute capability {device.compute_capability} ({device.name}), and no node of "
        f"the cluster has one: {', '.join(there) or 'there are no GPUs'}",
        hint=f"add such a node, or tell what one is: `ray start --resources '{{\"{fitting[0]}\": 1}}'`",
    )


def accelerators(compute_capability: str) -> list[str]:
    """Ray's names of the GPUs of our hardware profiles that have a compute capability: `NVIDIA L40S` is `L40S`."""
    found = []
    for name in machines.names():
        profile = machines.load(name) if name != "host" else None
        for device in profile.devices if profile else ():
            if device.compute_capability == compute_capability:
                match = re.match(r"\w+\s+(?:GeForce\s+)?((?:[A-Z]+\s+)*[A-Z0-9]*\d[A-Z0-9]*)", device.name)
                if match:
                    short = match[1].replace(" ", "-")
                    found += [short, f"GeForce-{short}"] if "GeForce" in device.name else [short]
    return found
