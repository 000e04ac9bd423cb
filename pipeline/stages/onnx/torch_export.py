"""A torch module with flat tensors in and out -> a clean onnx_ir model: the one call of torch's dynamo exporter.

What is cut, measured on MiniLM (6 layers) with the exporter's own way beside it, CPU seconds: decomposing a program
whose operators the exporter knows already, 2.3 -> 0; its optimizer's pattern rewrites, 1.0 -> 0.05 (constant folding,
dead nodes and common subexpressions stay; ONNX Runtime is as fast with the result).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline.errors import StageError
from pipeline.frozen import frozen


@frozen
class Port:
    """One input of the graph: an example tensor, and the name of each axis that may change (None: fixed)."""

    name: str
    example: Any
    axes: tuple[str | None, ...] = ()
    """As many as the example has axes, or empty when all are fixed."""


def export_module(module: Any, ports: Sequence[Port], outputs: Mapping[str, tuple[str | None, ...]], opset: int) -> Any:
    """An onnx_ir.Model of `module(*examples)`.

    `outputs` names what the module returns, in order, each with its axes' names where they may change. An axis name
    stands for one size in the whole interface. StageError when torch cannot trace or ONNX cannot express the module.
    """
    import torch

    dynamic = [{i: torch.export.Dim.DYNAMIC for i, axis in enumerate(p.axes) if axis is not None} for p in ports]
    examples = tuple(port.example for port in ports)
    with _quiet(), torch.no_grad():
        try:
            program = torch.export.export(module, examples, dynamic_shapes=_shapes(module, dynamic), strict=False)
            _use_plain_names(program)
            _decompose_only_when_needed(program)
            result = torch.onnx.export(
                program,
                examples,
                dynamo=True,
                opset_version=opset,
                optimize=False,
                verbose=False,
                input_names=[port.name for port in ports],
                output_names=list(outputs),
            )
        except Exception as error:  # the exporter raises types of its own, and any error of the model's code
            raise StageError(
                f"torch cannot export {type(module).__name__} to ONNX: {_first_line(error)}",
                hint="try another opset, or the exporter 'optimum', which patches architectures of its own list",
            ) from error
    model = result.model
    if model.opset_imports.get("") != opset:
        raise StageError(
            f"the exporter wrote opset {model.opset_imports.get('')} instead of {opset}", hint="ask for that opset"
        )
    _clean(model)
    _name_axes(model, ports, outputs)
    return model


def _shapes(module: Any, dynamic: list[dict[int, Any]]) -> Any:
    """Dynamic shapes as torch wants them: a flat tuple, or nested once when forward takes *args."""
    import inspect

    parameters = list(inspect.signature(module.forward).parameters.values())
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL:
        plain = len(parameters) - 1
        rest = tuple(dynamic[plain:])
        return (*dynamic[:plain], rest) if rest else tuple(dynamic)
    return tuple(dynamic)


def _first_line(error: Exception) -> str:
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = str(root).strip().splitlines()
    return f"{type(root).__name__}: {lines[0]}" if lines else type(root).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says about optional packages and about itself."""
    names = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir", "torch.export")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _use_plain_names(program: Any) -> None:
    """Rewrite operators that are another's alias, so that the exporter finds each one in its registry."""
    import torch

    aten = torch.ops.aten
    casts = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default}
    operators = {
        aten.__and__.Tensor: aten.bitwise_and.Tensor,
        aten.__or__.Tensor: aten.bitwise_or.Tensor,
        aten.min.other: aten.minimum.default,
        aten.max.other: aten.maximum.default,
    }
    same = {aten.contiguous.default, aten.detach.default, aten.detach_.default, aten.alias.default}
    same.add(aten.lift_fresh_copy.default)
    checks = {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg}
    checks |= {aten.sym_constrain_range_for_size.default, aten._assert_async.default}
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in operators:
            node.target = operators[node.target]
        elif node.target == aten.add_.Tensor and _is_alone(node.args[0], node):
            node.target = aten.add.Tensor
            node.args[0].replace_all_uses_with(node, delete_user_cb=lambda user, sum_=node: user > sum_)
        elif node.target in checks:
            graph.erase_node(node)
        elif node.target in casts or node.target in same:
            source, dtype = node.args[0], node.meta["val"].dtype
            if source.meta["val"].dtype != dtype:
                node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": dtype}
            elif any(user.op == "output" for user in node.users):  # the program's signature names this node
                node.target, node.args, node.kwargs = aten.clone.default, (source,), {}
            else:
                node.replace_all_uses_with(source, propagate_meta=False)
                graph.erase_node(node)
    program.graph_module.recompile()


def _is_alone(value: Any, writer: Any) -> bool:
    """Whether no view shares the memory of `value`, so that what `writer` does to it in place can make a new value."""

    def makes_view(node: Any) -> bool:
        schema = getattr(node.target, "_schema", None)
        return schema is None or any(each.alias_info is not None for each in schema.returns)

    return not any(makes_view(node) for node in (value, *(user for user in value.users if user is not writer)))


def _decompose_only_when_needed(program: Any) -> None:
    """Answer the exporter's request to decompose with the program itself where there is nothing to decompose."""
    import torch

    decompose = program.run_decompositions

    def run_decompositions(table: Any = None, *args: Any, **kwargs: Any) -> Any:
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            operator = isinstance(node.target, torch._ops.OpOverload)
            higher = isinstance(node.target, torch._ops.HigherOrderOperator)
            if higher or (operator and (node.target._schema.is_mutable or table is None or node.target in table)):
                return decompose(table, *args, **kwargs)
        return program

    program.run_decompositions = run_decompositions


def _clean(model: Any) -> None:
    """Fold constants, drop what is unused or double, and strip what only the exporting machine knows."""
    import onnx_ir
    import onnx_ir.passes.common as passes
    import onnxscript.optimizer

    passes.InlinePass()(model)
    onnxscript.optimizer.fold_constants(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    model.producer_name, model.producer_version, model.doc_string = "enginewright", "", ""
    model.domain, model.graph.name, model.graph.doc_string = "", "model", ""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    interface = {*model.graph.inputs, *model.graph.outputs}
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in interface:
                value.shape = None  # torch's symbols; a runtime infers its own
    for value in interface:
        value.metadata_props.clear()


def _name_axes(model: Any, ports: Sequence[Port], outputs: Mapping[str, tuple[str | None, ...]]) -> None:
    """Give the interface the axes' names; torch's exporter calls them s77."""
    import onnx_ir

    declared = {port.name: port.axes for port in ports} | dict(outputs)
    for value in (*model.graph.inputs, *model.graph.outputs):
        axes = declared[value.name] or (None,) * len(value.shape)
        sizes: list[int | str] = []
        for axis, size in zip(axes, value.shape, strict=True):
            if axis is None and not isinstance(size, int):
                raise StageError(
                    f"{value.name}: an axis of {value.shape} is not fixed", hint="this is a bug: report it"
                )
            sizes.append(size if axis is None else axis)
        value.shape = onnx_ir.Shape(sizes)
