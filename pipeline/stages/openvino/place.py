"""Give a decoder's weights their form in an OpenVINO model: as floats, or 8 and 4 bits in the layout of NNCF.

Compressed weights are Constant -> Convert -> (Subtract zero point) -> Multiply scale -> (Reshape) -> Convert, which the
plugins keep compressed and multiply with directly. The nodes are declared first; the values stream afterwards.

Legend: N rows (outputs), K columns (inputs), B blocks in a row, G block size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import UnavailableError
from pipeline.frozen import frozen
from pipeline.stages.checkpoint import Tensor
from pipeline.stages.openvino.file import Bin, Ghosts
from pipeline.stages.openvino.rtn import round_to_nearest
from pipeline.step import Progress

_SLICE_BYTES = 1 << 20
"""Quantization works on slices of this size, so that its passes stay in the cache."""
_COPY_BYTES = 16 << 20
_LARGEST = float(np.finfo(np.float16).max)
FLOATS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}


@frozen
class Form:
    """How one weight is stored: a float type, or `bits` in blocks of `group` columns (0: one block a row)."""

    kind: str = "f32"
    bits: int = 0
    group: int = 0
    symmetric: bool = False

    def fitting(self, columns: int, fallback: Form) -> Form:
        """This form, or the fallback where the columns are no multiple of the group: NNCF does likewise."""
        return fallback if self.group and columns % self.group else self


@frozen
class _Placed:
    name: str
    tensor: Tensor
    form: Form
    node: Any


@dataclass
class Placer:
    """Places weights by role (see openvino_decoder.Place) and writes them. `forms` is by role; `fallback` has no
    groups, so it fits every weight."""

    ghosts: Ghosts
    forms: Mapping[str, Form]
    fallback: Form
    placed: dict[tuple[str, Form], _Placed] = field(default_factory=dict)

    def __call__(self, role: str, tensor: Tensor) -> Any:
        """The node of a weight as fp32. The same tensor in the same form is one node: a tied head shares its table."""
        form = self.forms[role].fitting(tensor.shape[1], self.fallback)
        key = (tensor.name, form)
        if key not in self.placed:
            # A tensor in two forms (a tied table whose head is of another type) has two names.
            again = any(each.tensor.name == tensor.name for each in self.placed.values())
            name = f"{tensor.name}.{role}" if again else tensor.name
            self.placed[key] = _Placed(name, tensor, form, self._node(name, tensor, form))
        return self.placed[key].node

    def _node(self, name: str, tensor: Tensor, form: Form) -> Any:
        from openvino import opset15 as op

        if not form.bits:
            constant = self.ghosts.constant(name, tensor.shape, form.kind)
            if form.kind == "f32":
                return constant
            self.ghosts.kept.add(f"{name}/convert")
            return op.convert(constant, "f32", name=f"{name}/convert")
        n, k = tensor.shape
        blocks = (n, k // form.group, form.group) if form.group else (n, k)
        one = (*blocks[:-1], 1)
        kind = f"{'i' if form.symmetric else 'u'}{form.bits}"
        value = op.convert(self.ghosts.constant(name, blocks, kind), "f16")
        if not form.symmetric:
            zero = op.convert(self.ghosts.constant(f"{name}/zero_point", one, kind), "f16")
            value = op.subtract(value, zero, name=f"{name}/zero_point/subtract")
        scale = self.ghosts.constant(f"{name}/scale", one, "f16")
        value = op.multiply(value, scale, name=f"{name}/fq_weights_1")
        if form.group:
            value = op.reshape(value, op.constant(np.array([n, k], np.int64)), False)
        return op.convert(value, "f32", name=f"{name}/fq_weights_1/convert")

    def counts(self) -> dict[str, int]:
        """How many weights have each form: `u4 group 32`, `u8`."""
        found: dict[str, int] = {}
        for each in self.placed.values():
            form = each.form
            kind = f"{'i' if form.symmetric else 'u'}{form.bits}" if form.bits else form.kind
            name = f"{kind} group {form.group}" if form.group else kind
            found[name] = found.get(name, 0) + 1
        return dict(sorted(found.items()))

    def fill(self, target: Bin, progress: Progress) -> None:
        """Write every weight, in slices."""
        total, done = sum(each.tensor.length for each in self.placed.values()), 0
        for each in self.placed.values():
            if each.form.bits:
                _quantize(target, each.name, each.tensor, each.form)
            else:
                _copy(target, each.name, each.tensor, each.form.kind)
            done += each.tensor.length
            progress(done, total, "bytes")


def _copy(target: Bin, name: str, tensor: Tensor, kind: str) -> None:
    offset, rows = 0, tensor.shape[0]
    step = max(1, _COPY_BYTES * rows // max(1, tensor.length))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        stored = {"F32": "f32", "F16": "f16", "BF16": "bf16"}.get(tensor.dtype)
        values = tensor.rows(start, stop, "native" if stored == kind else "float32")
        offset = target.write(name, values if stored == kind else _as(values, kind, tensor), offset)


def _as(values: npt.NDArray[np.float32], kind: str, tensor: Tensor) -> npt.NDArray[Any]:
    if kind == "f32":
        return values
    if kind == "bf16":
        bits = values.view(np.uint32)
        # Round to nearest, ties to even: half a unit in the last place, less where the place before it is even.
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if max(values.max(), -values.min()) > _LARGEST:
        raise UnavailableError(
            f"{tensor.path.name}: tensor '{tensor.name}' has values beyond fp16's range (65504)",
            hint="use precision fp32, bf16, int8 or int4",
        )
    return values.astype(np.float16)


def _quantize(target: Bin, name: str, tensor: Tensor, form: Form) -> None:
    n, k = tensor.shape
    group = form.group or k
    step = max(2, _SLICE_BYTES // (4 * k) // 2 * 2)  # an even number of rows: 4-bit zero points come in pairs
    offsets = [0, 0, 0]
    for start in range(0, n, step):
        weight_NK = tensor.rows(start, min(n, start + step))
        rounded = round_to_nearest(weight_NK, form.bits, group, symmetric=form.symmetric)
        for index, part in enumerate(("", "/scale", "/zero_point")):
            values = rounded[index]
            if values is not None:
                offsets[index] = target.write(name + part, values, offsets[index])
