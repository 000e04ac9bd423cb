"""Compile a typed ONNX file into a plan: one code path for TensorRT 10.12 to 11 and for TensorRT-RTX.

Precision is in the graph, so no flag asks for one: the network is strongly typed, which 10.x wants said, 11 takes for
granted, and RTX knows no other way. Every plan gets a Builder of its own: a second network of the same Builder comes
out with other bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import StageError, UnavailableError
from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.stages.tensorrt import api as trt_api
from pipeline.stages.tensorrt.flavours import Flavour, sm
from pipeline.step import Progress

Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Input -> its smallest, usual and largest shape."""


@frozen(kw_only=True)
class Build:
    """How the builder works. What a flavour cannot do is refused when the recipe is planned."""

    optimization_level: int = option(3, "How long the builder searches: 0 least, 5 most.", ge=0, le=5)
    workspace_mib: int = option(
        0, "Scratch memory that a layer may take; 0: the library's own limit.", unit="MiB", ge=0
    )
    tf32: bool = option(False, "Let fp32 products round their inputs to TF32. Off: the gates of fp32 mean fp32.")
    sparse: bool = option(
        True, "Let the builder use the 2:4 pattern of a pruned model (`prune`). Without effect on dense weights."
    )
    hardware_compatibility: str = option(
        "", "tensorrt: engines for more than the building GPU: `ampere_plus` or `same_compute_capability`."
    )
    version_compatible: bool = option(
        False, "tensorrt: a plan that newer versions run, too. Its host code stays out: the lean runtime is loaded."
    )
    strip_weights: bool = option(False, "tensorrt: leave the weights out of the plan; they are refitted where it runs.")
    weight_streaming: bool = option(False, "Let weights stay in host memory, within a budget that is set when it runs.")


@frozen
class Built:
    """A plan and what is known of it without a GPU."""

    plan: bytes
    network: Mapping[str, Any]
    """Layers, and the inputs and outputs with their types, as the parser understood them."""
    timing: bytes
    """What the builder learned of this GPU's kernels; empty where the flavour keeps nothing."""


def build(
    trt: Any,
    flavour: Flavour,
    onnx: Path,
    profiles: Sequence[Profile],
    options: Build,
    capabilities: Sequence[str],
    *,
    sparse: bool = False,
    timing: bytes = b"",
    progress: Progress,
) -> Built:
    """Parse and compile. Raises StageError with the library's words, UnavailableError without the GPU that it needs."""
    logger = trt_api.logger(trt)
    trt_api.complaints(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # pybind's way of saying that the factory returned nothing
        raise UnavailableError(
            f"{flavour.title} cannot start a builder: {trt_api.complaints(trt) or error}",
            hint="it needs an NVIDIA driver and a GPU of the machine that the engine is for",
        ) from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        raise StageError(
            f"{flavour.title} cannot read the graph: {'; '.join(errors(parser)) or trt_api.complaints(trt)}",
            hint="`preflight` should have found this: report it with the recipe",
        )
    _let_attention_decompose(trt, network)
    config = builder.create_builder_config()
    _configure(trt, flavour, config, options, sparse)
    for index, profile in enumerate(profiles):
        wanted = builder.create_optimization_profile()
        for name, (low, usual, high) in profile.items():
            wanted.set_shape(name, low, usual, high)
        if config.add_optimization_profile(wanted) < 0:
            raise StageError(
                f"{flavour.title} refuses optimization profile {index}: {trt_api.complaints(trt) or dict(profile)}",
                hint="check `batch` and `sequence` of the target",
            )
    if trt_api.is_rtx(flavour):
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, sm(capability)), index)
    else:
        config.set_timing_cache(config.create_timing_cache(timing), ignore_mismatch=False)
    monitor = trt_api.monitor(trt, progress)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor.cancelled is not None:
        raise monitor.cancelled
    if plan is None:
        raise StageError(
            f"{flavour.title} cannot compile the graph: {trt_api.complaints(trt) or 'it gives no reason'}",
            hint="the step's log has all that it said",
        )
    learned = b"" if trt_api.is_rtx(flavour) else bytes(config.get_timing_cache().serialize())
    return Built(bytes(plan), describe(trt, network), learned)


def errors(parser: Any) -> list[str]:
    """What the parser complains of, a line each."""
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = f" ({error.node_operator()} {error.node_name()})" if error.node_operator() else ""
        found.append(f"{error.desc()}{node}")
    return list(dict.fromkeys(found))


def _configure(trt: Any, flavour: Flavour, config: Any, options: Build, sparse: bool) -> None:
    flag = trt.BuilderFlag
    if options.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = options.optimization_level
    if not options.tf32:
        config.clear_flag(flag.TF32)
    if sparse and options.sparse:
        config.set_flag(flag.SPARSE_WEIGHTS)
    if options.weight_streaming:
        config.set_flag(flag.WEIGHT_STREAMING)
    if trt_api.is_rtx(flavour):
        return
    if options.hardware_compatibility:
        level = options.hardware_compatibility.upper()
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if options.version_compatible:
        config.set_flag(flag.VERSION_COMPATIBLE)
        config.set_flag(flag.EXCLUDE_LEAN_RUNTIME)
    if options.strip_weights:
        config.set_flag(flag.STRIP_PLAN)
        config.set_flag(flag.REFIT_IDENTICAL)  # plain REFIT may drop a product's bias silently (11.3)


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Attention without a fused kernel (fp32, or an odd head size) becomes products: otherwise the build fails."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for index in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(index)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def describe(trt: Any, network: Any) -> dict[str, Any]:
    """The network as the parser understood it: what an engine inspector says on a GPU, as far as a CPU knows it."""

    def tensor(value: Any) -> dict[str, Any]:
        return {"name": value.name, "dtype": value.dtype.name, "shape": list(value.shape)}

    layers: list[dict[str, Any]] = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        shapes = [f"{out.dtype.name}{_shape(out)}" for out in outputs if out is not None]
        layers.append({"name": layer.name, "type": layer.type.name, "outputs": shapes})
    return {
        "inputs": [tensor(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [tensor(network.get_output(i)) for i in range(network.num_outputs)],
        "layers": layers,
    }


def _shape(value: Any) -> list[int]:
    try:
        return list(value.shape)
    except ValueError:  # a rank that is not known before it runs
        return []


def write_network(network: Mapping[str, Any], path: Path) -> None:
    """network.json: a line a layer."""
    rows = ",\n".join(json.dumps(layer) for layer in network["layers"])
    ports = ",\n".join(f'"{key}": {json.dumps(network[key])}' for key in ("inputs", "outputs"))
    path.write_text(f'{{\n{ports},\n"layers": [\n{rows}\n]\n}}\n', "utf-8")
