"""Stage tensorrt.engine: compile a typed graph into plans, laid out as a model of a Triton model repository.

TensorRT-RTX compiles on any machine, TensorRT on a GPU of the kind that the plan is for. The folder has `config.pbtxt`,
the plans under `1/`, `network.json` (the network as the parser understood it), the model's own files and engine.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.digest import sha256_file
from pipeline.errors import StageError
from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.size import holding
from pipeline.stages.share import share
from pipeline.stages.tensorrt import api as trt_api
from pipeline.stages.tensorrt import triton as trt_triton
from pipeline.stages.tensorrt.alone import build_alone
from pipeline.stages.tensorrt.build import Build, Profile, build, write_network
from pipeline.stages.tensorrt.flavours import Flavour, flavour, sm
from pipeline.step import Inputs, Progress, Stage

Range = tuple[int, int, int]
"""Smallest, usual, largest."""


@frozen(kw_only=True)
class EngineOptions:
    """What is compiled, and for whom."""

    flavour: str
    capabilities: tuple[str, ...]
    """Compute capabilities, `8.6`."""
    together: bool
    """One plan for all of them, or one each."""
    batch: Range
    sequence: Range
    """Encoders: tokens of an input. Decoders: tokens of a prompt that are read at once."""
    build: Build
    sparse: bool = False
    """Whether the weights are pruned 2:4."""
    timing_cache: str | None = option(None, "Folder of timing caches.", key=False)


def run(inputs: Inputs, options: EngineOptions, out: Path, progress: Progress) -> None:
    """inputs: graph. See the module. Errors as of `build`, and StageError where the layout and the engine differ."""
    trt, asked = trt_api.load(options.flavour), flavour(options.flavour)
    typed = json.loads((inputs["graph"] / "engine.json").read_text("utf-8"))
    onnx = inputs["graph"] / "model.onnx"
    profiles = profiles_of(onnx, options, decoder=typed["kind"] == "decoder")
    groups = [options.capabilities] if options.together else [(each,) for each in options.capabilities]
    folder = out / trt_triton.VERSION
    folder.mkdir()
    plans: dict[str, str] = {}
    network: Mapping[str, Any] = {}
    timing = _Timing(trt, asked, options)
    for index, group in enumerate(groups):
        name = "model.plan" if len(groups) == 1 else f"model.{sm(group[0]).lower()}.plan"

        part = _Share(progress, index, len(groups), ", ".join(map(sm, group)))
        if asked.builds_on_cpu:
            made = build_alone(asked.name, onnx, profiles, options.build, group, sparse=options.sparse, progress=part)
        else:
            made = build(
                trt, asked, onnx, profiles, options.build, group, sparse=options.sparse, progress=part,
                timing=timing.read(group[0]),
            )  # fmt: skip
        progress(index + 1, len(groups), ", ".join(map(sm, group)))
        timing.write(group[0], made.timing)
        (folder / name).write_bytes(made.plan)
        if not asked.builds_on_cpu:
            _inspect(trt, made.plan, out / f"inspector.{sm(group[0]).lower()}.json")
        plans |= dict.fromkeys(group, name)
        network = made.network
        del made
    _check_interface(network, typed)
    write_network(network, out / "network.json")
    text = trt_triton.config(asked, network, profiles, plans, plans[options.capabilities[0]])
    (out / "config.pbtxt").write_text(text, "utf-8")
    for path in sorted(inputs["graph"].iterdir()):
        if path.is_file() and path.name != "engine.json" and not path.name.startswith("model.onnx"):
            share(path, out / path.name)
    settings = {
        "flavour": asked.name,
        "version": trt_api.version(trt),
        "driver": asked.driver,
        "verified": asked.verified,
        "compute_capabilities": list(options.capabilities),
        "plans": {capability: f"{trt_triton.VERSION}/{name}" for capability, name in plans.items()},
        "digests": {f"{trt_triton.VERSION}/{p.name}": sha256_file(p) for p in sorted(folder.iterdir())},
        "profiles": [{name: [list(shape) for shape in shapes] for name, shapes in p.items()} for p in profiles],
        "sparse_weights": options.sparse and options.build.sparse,
    }
    engine = {**typed, "runtime": asked.name, "components": {"model": sorted(settings["digests"])[0]}}  # type: ignore[call-overload]
    (out / "engine.json").write_text(json.dumps({**engine, "settings": settings}, indent=2) + "\n", "utf-8")


def profiles_of(onnx_file: Path, options: EngineOptions, *, decoder: bool) -> list[Profile]:
    """An optimization profile, or a decoder's two: reading a prompt, and one token at a time."""
    import onnx

    graph = onnx.load_model(onnx_file, load_external_data=False).graph
    sequences = [options.sequence, (1, 1, 1)] if decoder else [options.sequence]
    profiles: list[Profile] = []
    for sequence in sequences:
        sizes = {"batch": options.batch, "sequence": sequence}
        profile = {}
        for value in graph.input:
            dims = [sizes.get(dim.dim_param, (dim.dim_value,) * 3) for dim in value.type.tensor_type.shape.dim]
            profile[value.name] = (
                tuple(dim[0] for dim in dims),
                tuple(dim[1] for dim in dims),
                tuple(dim[2] for dim in dims),
            )
        profiles.append(profile)
    return profiles


def _check_interface(network: Mapping[str, Any], typed: Mapping[str, Any]) -> None:
    """An encoder's network must take and give what its artifact will say; a decoder's must give logits."""
    names = {tensor["name"] for kind in ("inputs", "outputs") for tensor in network[kind]}
    ports: Sequence[Mapping[str, Any]] = [*typed["interface"]["inputs"], *typed["interface"]["outputs"]]
    wanted = {"logits", "input_ids"} if typed["kind"] == "decoder" else {port["name"] for port in ports}
    if not wanted <= names:
        raise StageError(f"the engine has no tensor '{sorted(wanted - names)[0]}'", hint="this is a bug: report it")


def _inspect(trt: Any, plan: bytes, path: Path) -> None:
    """What the engine inspector says of a plan, where this machine can load it."""
    engine = trt.Runtime(trt_api.logger(trt)).deserialize_cuda_engine(plan)
    if engine is not None:
        text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        path.write_text(text, "utf-8")


class _Share:
    """The progress of one plan as a part of all of them."""

    def __init__(self, progress: Progress, before: int, plans: int, who: str) -> None:
        self.progress, self.before, self.plans, self.who = progress, before, plans, who

    def __call__(self, done: float, total: float = 0, note: str = "") -> None:
        fraction = done / total if total else 0
        self.progress(self.before + fraction, self.plans, f"{note} ({self.who})")


class _Timing:
    """Timing caches in a folder of their own, one for each device and version: what they say holds nowhere else."""

    def __init__(self, trt: Any, asked: Flavour, options: EngineOptions) -> None:
        place = options.timing_cache if not asked.builds_on_cpu else None
        self.folder = Path(place) if place else None
        self.prefix = f"{asked.name}-{trt_api.version(trt)}-opt{options.build.optimization_level}"

    def _path(self, capability: str) -> Path | None:
        return self.folder and self.folder / f"{self.prefix}-{sm(capability).lower()}.timing"

    def read(self, capability: str) -> bytes:
        path = self._path(capability)
        return path.read_bytes() if path and path.is_file() else b""

    def write(self, capability: str, data: bytes) -> None:
        path = self._path(capability)
        if path and data:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(data)
            temporary.replace(path)


STAGE_RTX = Stage(
    "tensorrt-rtx.engine",
    run,
    version=1,
    tools=("onnx", *flavour("tensorrt-rtx").distributions),
    deterministic=False,  # equal only where the system lets alone.py settle
    memory=holding(350, weights=1.8),
)
STAGE = Stage(
    "tensorrt.engine", run, version=1, tools=("onnx", *flavour("tensorrt").distributions), scope="device",
    deterministic=False, memory=holding(350, weights=1.8),
)  # fmt: skip
"""What the builder times on a GPU decides which kernels it takes: two builds may differ."""
