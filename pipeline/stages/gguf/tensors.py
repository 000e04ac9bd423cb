"""The tensors of a GGUF file from a checkpoint's: names, shapes, and their rows as float32, slice by slice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import StageError
from pipeline.frozen import frozen
from pipeline.stages.checkpoint import Checkpoint, Tensor
from pipeline.stages.gguf.families import Model
from pipeline.stages.gguf.rope import rope_tensors

if TYPE_CHECKING:
    import numpy.typing as npt

    Rows = npt.NDArray[np.float32]

SLICE = 16 << 20
"""Bytes of float32 that are held of a tensor at a time."""
_IGNORED = ("rotary_emb.inv_freq", ".attention.masked_bias")
"""Buffers that old checkpoints carry."""


@frozen
class Part:
    """A tensor of the checkpoint, or the rows `first` to `last` of its second axis from the end."""

    tensor: Tensor
    expert: int | None = None
    """Which of fused experts: the place on the first axis."""
    first: int = 0
    last: int | None = None


@frozen
class Out:
    """A tensor of the GGUF file."""

    name: str
    shape: tuple[int, ...]
    """As torch has it: columns last."""
    parts: tuple[Part, ...]
    """One, or an expert each."""
    add: float = 0.0
    heads: int = 0
    """Rows of that many heads are taken from half-split to interleaved RoPE; 0: they are not."""
    values: Any = None
    """float32 values of a tensor that the checkpoint does not have."""

    @property
    def columns(self) -> int:
        return self.shape[-1]

    def slices(self) -> Iterator[tuple[int, Rows]]:
        """(expert, rows [n, columns] float32) in the file's order."""
        if self.values is not None:
            yield 0, self.values.reshape(1, -1)
            return
        for index, part in enumerate(self.parts):
            for rows in self._rows(part):
                flat = rows.reshape(-1, self.columns)
                yield index, flat + np.float32(self.add) if self.add else flat

    def _rows(self, part: Part) -> Iterator[Rows]:
        tensor = part.tensor
        if part.expert is not None:
            whole = tensor.rows(part.expert, part.expert + 1)[0]
            yield np.ascontiguousarray(whole[part.first : part.last])
        elif self.heads:
            yield interleave(tensor.numpy(), self.heads)
        else:
            yield from (rows for _, rows in tensor.slices(SLICE))


def interleave(rows: Rows, heads: int) -> Rows:
    """Rows of q or k [heads * dims, ...] from RoPE over halves, (x0, x_half), to RoPE over pairs, (x0, x1)."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


def tensors(model: Model, checkpoint: Checkpoint) -> list[Out]:
    """Every tensor of the file, in its order.

    Raises StageError for a tensor that is missing, has another shape, or is not of such a model.
    """
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == model.arch)
    names = gguf.get_tensor_name_map(arch, model.layers)
    used: set[str] = set()

    def name_of(source: str) -> str:
        found = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise StageError(f"the gguf package has no name for the tensor '{source}' of a {model.arch} model")
        return str(found)

    def take(source: str, shape: tuple[int, ...]) -> Out:
        tensor = checkpoint.take(source, shape)
        used.add(source)
        norm = source.endswith("norm.weight")
        heads = {"q_proj": model.heads, "k_proj": model.kv_heads}.get(source.split(".")[-2], 0) if model.permute else 0
        return Out(name_of(source), shape, (Part(tensor),), add=model.norm_offset if norm else 0.0, heads=heads)

    out = [Out(name, factors.shape, (), values=factors) for name, factors in rope_tensors(model.rope).items()]
    rows = checkpoint.take("model.embed_tokens.weight").shape[0]
    out.append(take("model.embed_tokens.weight", (rows, model.hidden)))
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}."
        for part in model.layer:
            shape = _shape(part, model)
            out.append(take(f"{prefix}{part}.weight", shape))
            if part in model.biased:
                out.append(take(f"{prefix}{part}.bias", shape[:1]))
        if model.experts:
            out.append(take(f"{prefix}{model.router}.weight", (model.experts, model.hidden)))
            out += _experts(prefix, model, checkpoint, layer, used)
    out.append(take("model.norm.weight", (model.hidden,)))
    if not model.tied:
        out.append(take("lm_head.weight", (rows, model.hidden)))
    used.add("lm_head.weight")  # of tied embeddings some checkpoints carry a copy
    for source in checkpoint:
        if source not in used and not source.endswith(_IGNORED):
            raise StageError(
                f"the checkpoint has the tensor '{source}', which a {model.family} model has no place for",
                hint="config.json and the weights are not of the same model, or the family has changed",
            )
    return out


def _shape(part: str, model: Model) -> tuple[int, ...]:
    name, hidden, inner = part.rpartition(".")[2], model.hidden, model.intermediate
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "qkv_proj": (queries + 2 * keys, hidden),
        "o_proj": (hidden, queries),
        "q_norm": (model.head_dim,),
        "k_norm": (model.head_dim,),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "gate_up_proj": (2 * inner, hidden),
        "down_proj": (hidden, inner),
    }
    return shapes.get(name, (hidden,))


def _experts(prefix: str, model: Model, checkpoint: Checkpoint, layer: int, used: set[str]) -> Sequence[Out]:
    """gate, up and down of all experts of a layer, whether the checkpoint has them one by one or in one tensor."""
    hidden, inner = model.hidden, model.intermediate
    found = []
    fused = prefix + model.each["gate"].partition("experts.")[0] + "experts."
    for kind in ("gate", "up", "down"):
        shape = (hidden, inner) if kind == "down" else (inner, hidden)
        first = prefix + model.each[kind].format(e=0) + ".weight"
        if first not in checkpoint and f"{fused}gate_up_proj" in checkpoint:
            name = fused + ("down_proj" if kind == "down" else "gate_up_proj")
            whole = (model.experts, *((hidden, inner) if kind == "down" else (2 * inner, hidden)))
            tensor = checkpoint.take(name, whole)
            used.add(name)
            start = inner if kind == "up" else 0
            parts = tuple(Part(tensor, e, start, start + shape[0]) for e in range(model.experts))
        else:
            names = [prefix + model.each[kind].format(e=e) + ".weight" for e in range(model.experts)]
            parts = tuple(Part(checkpoint.take(name, shape)) for name in names)
            used.update(names)
        found.append(Out(f"blk.{layer}.ffn_{kind}_exps.weight", (model.experts, *shape), parts))
    return found
