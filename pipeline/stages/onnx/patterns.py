"""Find what quantization is about in a graph: products with constants, the head, embedding tables, attention inputs."""

from __future__ import annotations

from typing import Any, NamedTuple

from pipeline.frozen import frozen
from pipeline.stages.onnx.rewrite import ExportedGraph
from pipeline.stages.onnx.sources import BFLOAT16, FLOAT, FLOAT16

PRODUCTS = ("MatMul", "FusedMatMul", "Gemm")
_FLOATS = (FLOAT, FLOAT16, BFLOAT16)
_TABLE = 1 << 16
"""A smaller table is not worth quantizing."""


@frozen
class Linear:
    """A matrix product with a constant weight: `node` computes activations [.., K] times the weight."""

    node: Any
    weight: str
    """The initializer."""
    transposed: bool
    """Stored [N, K], as Hugging Face does; else [K, N]."""
    n: int
    k: int
    bias: str = ""
    """An initializer [N] that Gemm adds."""


class Projections(NamedTuple):
    """What feeds a GroupQueryAttention node: the products for query, key and value, and their biases, three or none."""

    attention: Any
    products: tuple[Linear, ...]
    biases: tuple[str, ...]


def linears(graph: ExportedGraph) -> list[Linear]:
    """Every product of activations with a two-dimensional constant, in graph order."""
    found = (_linear(graph, node) for node in graph.proto.graph.node)
    return [linear for linear in found if linear is not None]


def _linear(graph: ExportedGraph, node: Any) -> Linear | None:
    if node.op_type not in PRODUCTS:
        return None
    attributes = {attribute.name: attribute for attribute in node.attribute}

    def integer(name: str) -> int:
        return int(attributes[name].i) if name in attributes else 0

    scales = [attributes[name].f for name in ("alpha", "beta") if name in attributes]
    if any(scale != 1 for scale in scales) or integer("transA") or integer("transBatchA") or integer("transBatchB"):
        return None
    transposed, weight = bool(integer("transB")), node.input[1]
    before = graph.producers.get(weight)
    if before is not None and before.op_type == "Transpose" and before.input[0] in graph.initializers:
        permutation = next((list(item.ints) for item in before.attribute if item.name == "perm"), [1, 0])
        if permutation != [1, 0]:
            return None
        weight, transposed = before.input[0], not transposed
    tensor = graph.initializers.get(weight)
    if tensor is None or len(tensor.dims) != 2 or tensor.data_type not in _FLOATS:
        return None
    rows, columns = tensor.dims
    n, k = (rows, columns) if transposed else (columns, rows)
    bias = node.input[2] if len(node.input) > 2 else ""
    if bias and (bias not in graph.initializers or list(graph.initializers[bias].dims) != [n]):
        return None
    return Linear(node, weight, transposed, n, k, bias)


def head(graph: ExportedGraph) -> str:
    """Output of the product that makes the logits; "" when there is none."""
    name = "logits"
    while name in graph.producers:
        node = graph.producers[name]
        if node.op_type in PRODUCTS:
            return name
        name = node.input[0]
    return ""


def tables(graph: ExportedGraph) -> list[Any]:
    """The Gather nodes that look rows up in a large two-dimensional float table."""

    def is_table(node: Any) -> bool:
        tensor = graph.initializers.get(node.input[0]) if node.op_type == "Gather" else None
        if tensor is None or tensor.data_type not in _FLOATS or len(tensor.dims) != 2:
            return False
        axis = next((item.i for item in node.attribute if item.name == "axis"), 0)
        return bool(axis == 0 and tensor.dims[0] * tensor.dims[1] >= _TABLE)

    return [node for node in graph.proto.graph.node if is_table(node)]


def projections(graph: ExportedGraph, products: list[Linear]) -> list[Projections]:
    """The attention nodes whose query, key and value could come from one product: three FusedMatMul of the same
    activations with [N, K] weights of one type, read by nobody else."""
    by_output = {linear.node.output[0]: linear for linear in products}
    nodes = (node for node in graph.proto.graph.node if node.op_type == "GroupQueryAttention" and node.input[1])
    found = (_projections(graph, node, by_output) for node in nodes)
    return [three for three in found if three is not None]


def _projections(graph: ExportedGraph, attention: Any, by_output: dict[str, Linear]) -> Projections | None:
    three, biases = [], []
    for name in attention.input[:3]:
        before = graph.producers.get(name)
        if before is not None and before.op_type == "Add":
            biases.append(next((item for item in before.input if item in graph.initializers), ""))
            name = next((item for item in before.input if item in by_output), "")
        linear = by_output.get(name)
        if linear is None or linear.node.op_type != "FusedMatMul" or not linear.transposed:
            return None
        if len(graph.consumers[name]) != 1:
            return None
        three.append(linear)
    types = {graph.initializers[linear.weight].data_type for linear in three}
    bias_types = {graph.initializers[name].data_type if name else 0 for name in biases}
    same_input = len({linear.node.input[0] for linear in three}) == 1
    if not same_input or len(types) != 1 or len(biases) not in (0, 3) or len(bias_types) > 1 or 0 in bias_types:
        return None
    return Projections(attention, tuple(three), tuple(biases))


def pack(graph: ExportedGraph, found: Projections) -> Linear:
    """Let one product make query, key and value, which GroupQueryAttention takes side by side."""
    node = found.products[0].node
    node.name = f"{found.attention.name}.qkv_proj"
    weight = graph.stack(f"{node.name}.weight", tuple(linear.weight for linear in found.products))
    node.input[1] = weight
    if found.biases:
        add = graph.producers[found.attention.input[0]]
        add.input[list(add.input).index(found.biases[0])] = graph.stack(f"{node.name}.bias", found.biases)
    found.attention.input[1] = found.attention.input[2] = ""
    graph.refresh()
    n, k = graph.initializers[weight].dims
    return Linear(node, weight, True, n, k)
