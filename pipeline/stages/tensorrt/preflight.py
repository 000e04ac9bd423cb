"""Stage tensorrt.preflight: ask TensorRT's parser, before any long step, which nodes of an exported graph it refuses.

A node is told with its name, its operator, the module of the model that it came from, the parser's reason, and a way
out. Modules are read from the graph itself: Hugging Face names a module's weights after it, so a node belongs to the
module whose weights it reads, or lies between those that its neighbours read.
"""

from __future__ import annotations

import json
import tempfile
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UnavailableError
from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.size import holding
from pipeline.stages.tensorrt import api as trt_api
from pipeline.stages.tensorrt.flavours import flavour
from pipeline.step import Inputs, Progress, Stage

_SHOWN = 8
_WAYS_OUT = {
    "com.microsoft": "the graph has operators of ONNX Runtime: export it by torch, unoptimized",
    "DynamicQuantizeLinear": "dynamic quantization is ONNX Runtime's own: use precision int8, which calibrates",
    "MatMulInteger": "dynamic quantization is ONNX Runtime's own: use precision int8, which calibrates",
    "Attention": "attention with a cache inside the operator: decoders are built by the static exporter",
}
_ELSEWHERE = "use `runtime: onnxruntime`, which has this operator"


@frozen(kw_only=True)
class PreflightOptions:
    """Whose parser is asked."""

    flavour: str = option("tensorrt-rtx", "tensorrt or tensorrt-rtx.")


@frozen
class Refused:
    """A node that the parser does not take."""

    node: str
    operator: str
    module: str
    reason: str

    @property
    def way_out(self) -> str:
        """What to do about it."""
        return next((text for key, text in _WAYS_OUT.items() if key in self.operator), _ELSEWHERE)


def run(inputs: Inputs, options: PreflightOptions, out: Path, progress: Progress) -> None:
    """inputs: export, model. Writes preflight.json. UnavailableError names every node that is refused."""
    from pipeline.stages.checkpoint import read_json

    trt, asked = trt_api.load(options.flavour), flavour(options.flavour)
    export = read_json(inputs["export"] / "export.json")
    operators: dict[str, int] = {}
    for file in export["components"].values():
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            # The parser looks for weights beside the graph; an export leaves them where the checkpoint has them.
            beside = [*inputs["model"].glob("*.safetensors"), *inputs["export"].glob("*.onnx*")]
            for path in beside:
                (Path(scratch) / path.name).symlink_to(path.resolve())
            refused = examine(trt, Path(scratch) / file)
        for operator in _operators(inputs["export"] / file):
            operators[operator] = operators.get(operator, 0) + 1
        if refused:
            raise UnavailableError(
                f"{asked.title} {trt_api.version(trt)} refuses {len(refused)} of {sum(operators.values())} nodes:\n"
                + "\n".join(explain(each) for each in refused[:_SHOWN])
                + (f"\n... and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""),
                hint="; ".join(dict.fromkeys(each.way_out for each in refused)),
            )
    document = {"flavour": asked.name, "version": trt_api.version(trt), "operators": dict(sorted(operators.items()))}
    (out / "preflight.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    progress(1, 1)


def explain(refused: Refused) -> str:
    """One line for a reader."""
    where = f" in {refused.module}" if refused.module else ""
    return f"  {refused.operator} '{refused.node}'{where}: {refused.reason}"


def examine(trt: Any, path: Path) -> list[Refused]:
    """The nodes of a graph that the parser refuses, in graph order; empty when it takes all of them."""
    import onnx

    logger = trt_api.logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    taken = parser.supports_model_v2(path.read_bytes(), str(path))
    trt_api.complaints(trt)
    if taken:
        return []
    graph = onnx.load_model(path, load_external_data=False).graph
    reasons: dict[int, list[str]] = {}
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        reasons.setdefault(error.node(), []).append(_reason(error.desc()))
    # A node with an error is refused; subgraphs are what lies between such nodes, and not judged when there are any.
    bad = {index for index in reasons if 0 <= index < len(graph.node)} or {
        node
        for index in range(parser.num_subgraphs)
        if not parser.is_subgraph_supported(index)
        for node in parser.get_subgraph_nodes(index)
    }
    modules = modules_of(graph, bad)
    general = "; ".join(dict.fromkeys(text for index, texts in reasons.items() if index not in bad for text in texts))
    found = []
    for index in sorted(bad):
        node = graph.node[index]
        operator = f"{node.domain}.{node.op_type}" if node.domain else str(node.op_type)
        reason = "; ".join(dict.fromkeys(reasons.get(index, ()))) or general or "not supported"
        found.append(Refused(node.name or node.output[0], operator, modules[index], reason))
    return found or [Refused(graph.name, "graph", "", general or "the parser gives no reason")]


def _reason(description: str) -> str:
    """The parser's reason; where it is only the expression that failed, in words."""
    if description == "false":
        return "TensorRT has no such operator"
    if "Plugin not found" in description:
        return "TensorRT knows no such operator, and no plugin of that name is there"
    return description


def modules_of(graph: Any, indices: Iterable[int]) -> dict[int, str]:
    """Node index -> the module of the model that it came from; empty where nothing near it has a weight."""
    producers = {name: node for node in graph.node for name in node.output if name}
    consumers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    weights = {tensor.name: module for tensor in graph.initializer if (module := _module(tensor.name))}
    found = {}
    for index in indices:
        node = graph.node[index]
        own = next((weights[name] for name in node.input if name in weights), "")
        before = own or _nearest(node, weights, lambda n: [producers[i] for i in n.input if i in producers])
        after = own or _nearest(node, weights, lambda n: [c for o in n.output for c in consumers.get(o, ())])
        found[index] = _between(before, after)
    return found


def _nearest(start: Any, weights: Mapping[str, str], neighbours: Any) -> str:
    """The module of the nearest node that reads a weight, breadth first."""
    waiting, seen = deque(neighbours(start)), set()
    while waiting:
        node = waiting.popleft()
        key = node.output[0] if node.output else id(node)
        if key in seen:
            continue
        seen.add(key)
        if module := next((weights[name] for name in node.input if name in weights), ""):
            return module
        waiting.extend(neighbours(node))
    return ""


def _module(weight: str) -> str:
    """`encoder.layer.0.attention.self.query` for `encoder.layer.0.attention.self.query.weight`; "" for constants."""
    module, dot, last = weight.rpartition(".")
    return module if (dot and last in ("weight", "bias", "gamma", "beta")) or "." in module else ""


def _between(before: str, after: str) -> str:
    """The innermost module that holds both, when there is one, else the two."""
    if not before or not after or before == after:
        return before or after
    common = []
    for one, other in zip(before.split("."), after.split("."), strict=False):
        if one != other:
            break
        common.append(one)
    # `encoder.layer` holds every layer and says nothing: a shared module must be one layer's or narrower.
    return ".".join(common) if any(part.isdigit() for part in common) else f"{before} .. {after}"


def _operators(path: Path) -> list[str]:
    import onnx

    return [node.op_type for node in onnx.load_model(path, load_external_data=False).graph.node]


STAGE_RTX = Stage(
    "tensorrt-rtx.preflight",
    run,
    version=1,
    tools=("onnx", *flavour("tensorrt-rtx").distributions),
    memory=holding(220),
)
STAGE = Stage(
    "tensorrt.preflight", run, version=1, tools=("onnx", *flavour("tensorrt").distributions), memory=holding(220)
)
