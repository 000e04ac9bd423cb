"""An ONNX graph in torch, node by node: a second reader of typed graphs, and what a GPU computes of them.

Products, sums and norms are torch's own in the very types of the graph (fp16, bf16), on any device. Q/DQ nodes round as
ONNX says. Only the operators of our typed graphs are here; any other raises KeyError.

Legend: B rows, H heads, S tokens, K keys, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto as T

DTYPES = {
    T.FLOAT: torch.float32, T.FLOAT16: torch.float16, T.BFLOAT16: torch.bfloat16, T.INT64: torch.int64,
    T.INT32: torch.int32, T.INT8: torch.int8, T.UINT8: torch.uint8, T.BOOL: torch.bool,
    T.FLOAT8E4M3FN: torch.float8_e4m3fn, T.INT4: torch.int8, T.DOUBLE: torch.float64,
}  # fmt: skip
LIMITS = {T.INT8: (-128, 127), T.UINT8: (0, 255)}


def tensor_of(proto: onnx.TensorProto, base: str) -> torch.Tensor:
    array = onnx.numpy_helper.to_array(proto, base)
    if proto.data_type == T.BFLOAT16:
        return torch.from_numpy(array.view(np.uint16).astype(np.int32)).to(torch.uint16).view(torch.bfloat16)
    if proto.data_type == T.FLOAT8E4M3FN:
        return torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    if proto.data_type == T.INT4:
        array = array.astype(np.int8)
    return torch.from_numpy(np.array(array))


class TorchGraph:
    """A graph whose weights lie on `device`."""

    def __init__(self, file: Path, device: str) -> None:
        model = onnx.load_model(file)
        self.nodes, self.device = list(model.graph.node), device
        self.weights = {t.name: tensor_of(t, str(file.parent)).to(device) for t in model.graph.initializer}
        self.inputs = {value.name: value.type.tensor_type for value in model.graph.input}
        self.outputs = {value.name: value.type.tensor_type for value in model.graph.output}

    def __call__(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        values: dict[str, Any] = {"": None, **self.weights, **feeds}
        for node in self.nodes:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Constant":
                found: Any = self._constant(attributes)
            else:
                found = OPS[node.op_type](*(values[name] for name in node.input), **attributes)
            values[node.output[0]] = found
        return {name: values[name] for name in self.outputs}

    def _constant(self, attributes: dict[str, Any]) -> torch.Tensor:
        ((name, value),) = attributes.items()
        found = tensor_of(value, "") if name == "value" else torch.tensor(value)
        return found.to(self.device)


def ints(tensor: torch.Tensor) -> list[int]:
    return [int(each) for each in tensor.flatten().tolist()]


def over(axis: int, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """A vector along one axis of a tensor with `rank` axes."""
    return tensor.reshape([-1 if each == axis % rank else 1 for each in range(rank)]) if tensor.ndim == 1 else tensor


def spread(scale: torch.Tensor, like: torch.Tensor, axis: int, block_size: int) -> torch.Tensor:
    if not block_size:
        return over(axis, scale, like.ndim)
    return scale.repeat_interleave(block_size, axis).narrow(axis, 0, like.shape[axis])


def dequantize(x: Any, scale: Any, zero: Any = None, axis: int = 1, block_size: int = 0, output_dtype: int = 0) -> Any:
    wide = x.to(torch.float32)
    if zero is not None:
        wide = wide - spread(zero.to(torch.float32), x, axis, block_size)
    kind = DTYPES[output_dtype] if output_dtype else scale.dtype
    return (wide * spread(scale.to(torch.float32), x, axis, block_size)).to(kind)


def quantize(x: Any, scale: Any, zero: Any = None, axis: int = 1, output_dtype: int = 0, **_: Any) -> Any:
    scaled = x.to(torch.float32) / over(axis, scale.to(torch.float32), x.ndim)
    kind = zero.dtype if zero is not None else DTYPES[output_dtype or T.UINT8]
    if kind == torch.float8_e4m3fn:
        return scaled.clamp(-448, 448).to(kind)
    whole = scaled.round() + (over(axis, zero.to(torch.float32), x.ndim) if zero is not None else 0)
    low, high = (-128, 127) if kind == torch.int8 else (0, 255)
    return whole.clamp(low, high).to(kind)


def attention(
    q: Any, k: Any, v: Any, mask: Any = None, *more: Any,
    scale: float | None = None, is_causal: int = 0, q_num_heads: int = 0, kv_num_heads: int = 0, **other: Any,
) -> Any:  # fmt: skip
    """[B, H, S, D] or [B, S, H * D]; a mask of booleans (True: seen) or of summands."""
    assert not any(each is not None for each in more) and not any(other.values()), (more, other)
    flat = q.ndim == 3
    if flat:
        split = lambda x, heads: x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)  # noqa: E731
        q, k, v = split(q, q_num_heads), split(k, kv_num_heads), split(v, kv_num_heads)
    groups = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(groups, 1) for each in (k, v))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril() if is_causal else None
    if mask is not None:
        seen = mask if seen is None else (seen & mask if mask.dtype == torch.bool else mask.masked_fill(~seen, -1e4))
    if seen is not None and seen.dtype != torch.bool:
        seen = seen.to(q.dtype)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return out.transpose(1, 2).flatten(2) if flat else out


def rotary(
    x: Any, cos: Any, sin: Any, places: Any = None,
    interleaved: int = 0, num_heads: int = 0, rotary_embedding_dim: int = 0,
) -> Any:  # fmt: skip
    flat = x.ndim == 3
    x_BSHD = x.reshape(*x.shape[:2], num_heads, -1) if flat else x.transpose(1, 2)
    assert not interleaved
    if places is not None:
        cos, sin = cos[places], sin[places]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    width = rotary_embedding_dim or x_BSHD.shape[-1]
    turned, rest = x_BSHD[..., :width], x_BSHD[..., width:]
    one, two = turned.chunk(2, -1)
    out = torch.cat([cos * one - sin * two, sin * one + cos * two, rest], -1)
    return out.flatten(2) if flat else out.transpose(1, 2)


def scatter(past: Any, update: Any, places: Any = None, axis: int = -2, mode: bytes = b"linear") -> Any:
    """[B, ...] with rows of `update` written at `places` [B] of an axis."""
    assert mode == b"linear"
    out, along = past.clone(), axis % past.ndim
    for row in range(len(past)):
        place = int(places[row]) if places is not None else 0
        out[row].narrow(along - 1, place, update.shape[along]).copy_(update[row])
    return out


def layer_norm(x: Any, scale: Any, bias: Any = None, axis: int = -1, epsilon: float = 1e-5, **_: Any) -> Any:
    wide = [each.to(torch.float32) if each is not None else None for each in (scale, bias)]
    return torch.nn.functional.layer_norm(x.float(), x.shape[axis:], *wide, epsilon).to(x.dtype)


def rms_norm(x: Any, scale: Any, axis: int = -1, epsilon: float = 1e-5, **_: Any) -> Any:
    return torch.nn.functional.rms_norm(x.float(), x.shape[axis:], scale.float(), epsilon).to(x.dtype)


def slices(x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    found = [slice(None)] * x.ndim
    first, last = ints(starts), ints(ends)
    for number, axis in enumerate(ints(axes) if axes is not None else range(len(first))):
        found[axis] = slice(first[number], last[number], ints(steps)[number] if steps is not None else 1)
    return x[tuple(found)]


def reshape(x: Any, shape: Any, allowzero: int = 0) -> Any:
    wanted = ints(shape)
    return x.reshape(wanted if allowzero else [x.shape[i] if n == 0 else n for i, n in enumerate(wanted)])


def shape_of(x: Any, start: int = 0, end: int | None = None) -> Any:
    return torch.tensor(tuple(x.shape)[start:end], dtype=torch.int64, device=x.device)


def unsqueeze(x: Any, axes: Any) -> Any:
    for axis in sorted(each % (x.ndim + axes.numel()) for each in ints(axes)):
        x = x.unsqueeze(axis)
    return x


def reduce(do: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Any, axes: Any = None, keepdims: int = 1, **_: Any) -> Any:
        return do(x, ints(axes) if axes is not None else list(range(x.ndim)), bool(keepdims))

    return call


def gather_nd(x: Any, places: Any, batch_dims: int = 0) -> Any:
    assert not batch_dims
    return x[tuple(places.unbind(-1))]


def expand(x: Any, shape: Any) -> Any:
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(ints(shape))))


def concat(*xs: Any, axis: int) -> Any:
    return torch.cat(xs, axis)


def clip(x: Any, low: Any = None, high: Any = None) -> Any:
    return torch.clamp(x, low, high)


def arange(start: Any, limit: Any, delta: Any) -> Any:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device)


def gather(x: Any, places: Any, axis: int = 0) -> Any:
    out = x.index_select(axis, places.flatten())
    return out.reshape(x.shape[:axis] + places.shape + x.shape[axis:][1:])


def gelu(x: Any, approximate: bytes = b"none") -> Any:
    return torch.nn.functional.gelu(x, approximate=approximate.decode())


def transpose(x: Any, perm: Sequence[int] = ()) -> Any:
    return x.permute(list(perm) or list(range(x.ndim))[::-1])


OPS: dict[str, Callable[..., Any]] = {
    "Add": torch.add, "Mul": torch.mul, "Div": torch.div, "Max": torch.maximum, "And": torch.logical_and,
    "MatMul": torch.matmul, "Sigmoid": torch.sigmoid, "LessOrEqual": torch.le, "GreaterOrEqual": torch.ge,
    "Attention": attention, "RotaryEmbedding": rotary, "TensorScatter": scatter, "Gelu": gelu,
    "LayerNormalization": layer_norm, "RMSNormalization": rms_norm, "QuantizeLinear": quantize,
    "DequantizeLinear": dequantize, "Shape": shape_of, "Reshape": reshape, "Transpose": transpose, "Slice": slices,
    "Gather": gather, "GatherND": gather_nd, "Unsqueeze": unsqueeze, "Range": arange, "Expand": expand,
    "Concat": concat, "Clip": clip,
    "Squeeze": lambda x, axes=None: x.squeeze(ints(axes)) if axes is not None else x.squeeze(),
    "Cast": lambda x, to, **_: x.to(DTYPES[to]),
    "ReduceSum": reduce(lambda x, axes, keep: x.sum(axes, keep)),
    "ReduceL2": reduce(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
}  # fmt: skip
