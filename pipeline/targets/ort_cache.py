"""KV caches of ONNX Runtime decoders: one buffer that the graph writes into, or pasts that it concatenates.

Legend: B rows, S tokens fed at once, T tokens in the cache, C capacity, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.engine import Array
from pipeline.targets.ort_session import Graph, as_float32

_LOGITS_BYTES = 64 << 20  # of one prefill chunk: a graph gives the logits of every token that it reads
_SHORTEST_CHUNK = 128  # tokens: below, reading the weights again costs more than the logits' memory is worth


def cache_names(graph: Graph) -> dict[str, str]:
    """past_key_values.{i}.key|value -> present.{i}.key|value, as the graph has them."""
    pasts = (name for name in graph.inputs if name.startswith("past_key_values."))
    return {name: name.replace("past_key_values.", "present.", 1) for name in pasts}


class SharedCache:
    """A buffer of fixed capacity for every layer, of which each row uses its own length: past and present are one.

    The GroupQueryAttention of `cache: gqa` graphs appends in place, a row at its own place. So prompts need no padding:
    each is read alone into its row, and the rows then go on together.
    """

    def __init__(self, graph: Graph, heads: int, head_dim: int, vocab_size: int, batch: int, capacity: int) -> None:
        self._graph = graph
        self._vocab_size = vocab_size
        self._names = cache_names(graph)
        self._shape = (heads, capacity, head_dim)
        # numpy's arrays on the CPU, OrtValues elsewhere. An OrtValue does not keep its array alive for its views.
        self._buffers = {name: self._buffer(self._zeros(name, batch)) for name in self._names}
        self._spare: dict[str, Any] = {}
        self._lengths = np.zeros(batch, np.int64)
        # Of `step`, as long as the rows stay the same.
        self._binding: Any = None
        self._logits: Array = np.zeros(0)

    def prefill(self, row: int, ids: Sequence[int]) -> Array:
        """Read a prompt into a row that is empty. Returns the last token's logits [V]."""
        chunk = max(_SHORTEST_CHUNK, _LOGITS_BYTES // (4 * self._vocab_size))
        binding = self._graph.session.io_binding()
        self._bind_caches(binding, row, 1)
        for start in range(0, len(ids), chunk):
            part = np.asarray(ids[start : start + chunk])[None]
            places = np.arange(start, start + part.shape[1])[None]
            self._bind_inputs(binding, part, np.ones((1, start + part.shape[1])), places)
            binding.bind_output("logits", "cpu")
            self._graph.call(lambda: self._graph.session.run_with_iobinding(binding))
        self._lengths[row] = len(ids)
        return np.array(binding.get_outputs()[-1].numpy()[0, -1], np.float32)  # a copy: the others are let go

    def step(self, tokens: Sequence[int]) -> Array:
        """Feed one token to every row. Returns the logits [B, V], which the next call overwrites."""
        if self._binding is None:
            self._bind_step(len(self._lengths))
        places = self._lengths[:, None]
        self._bind_inputs(self._binding, np.array(tokens)[:, None], np.arange(places.max() + 1) <= places, places)
        self._graph.call(lambda: self._graph.session.run_with_iobinding(self._binding))
        self._lengths += 1
        return as_float32(self._logits[:, 0])

    def reorder(self, rows: Sequence[int]) -> None:
        """Make the new row i a copy of the old row rows[i]."""
        if list(rows) == list(range(len(self._lengths))):
            return
        used = int(self._lengths.max())
        dropped = len(rows) <= len(self._lengths) and all(old >= new for new, old in enumerate(rows))
        for name, buffer in self._buffers.items():
            if self._graph.device != "cpu":
                self._buffers[name] = self._buffer(np.ascontiguousarray(buffer.numpy()[list(rows)]))
            elif dropped:
                # The others move up, and none is overwritten before it has been read.
                self._buffers[name] = _copied(buffer[: len(rows)], buffer, rows, used)
            else:
                # Beams change places at every step: two buffers take turns.
                spare = self._spare.get(name)
                if spare is None or len(spare) != len(rows):
                    spare = self._zeros(name, len(rows))
                self._buffers[name], self._spare[name] = _copied(spare, buffer, rows, used), buffer
        self._lengths = self._lengths[list(rows)]
        self._binding = None

    def absorb(self, other: SharedCache) -> None:
        """Take another cache's rows in, after the own ones. The capacity becomes the larger one."""
        mine, theirs = len(self._lengths), len(other._lengths)
        heads, capacity, width = self._shape
        self._shape = (heads, max(capacity, other._shape[1]), width)
        for name in self._names:
            joined = self._zeros(name, mine + theirs)
            for rows, cache in ((slice(0, mine), self), (slice(mine, None), other)):
                if len(cache._lengths):
                    used = int(cache._lengths.max())
                    buffer = cache._buffers[name]
                    joined[rows, :, :used] = (buffer if self._graph.device == "cpu" else buffer.numpy())[:, :, :used]
            self._buffers[name] = self._buffer(joined)
        self._lengths = np.concatenate([self._lengths, other._lengths])
        self._spare, self._binding = {}, None

    def _zeros(self, name: str, batch: int) -> Array:
        return np.zeros((batch, *self._shape), self._graph.dtype(name))

    def _buffer(self, array: Array) -> Any:
        return array if self._graph.device == "cpu" else self._graph.value(array)

    def _bind_caches(self, binding: Any, row: int, batch: int) -> None:
        for past, present in self._names.items():
            dtype = self._graph.dtype(past)
            shape = (batch, *self._shape)
            buffer = self._buffers[past]
            address = buffer.ctypes.data if self._graph.device == "cpu" else buffer.data_ptr()
            address += row * int(np.prod(self._shape)) * dtype.itemsize
            place = (self._graph.device, self._graph.device_id, dtype.type, shape, address)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)

    def _bind_step(self, batch: int) -> None:
        """Bind what stays in its place while the rows stay the same: the caches and the logits."""
        self._binding = self._graph.session.io_binding()
        self._bind_caches(self._binding, 0, batch)
        shape = (batch, 1, self._vocab_size)
        self._logits = np.zeros(shape, self._graph.dtype("logits"))
        self._binding.bind_output("logits", "cpu", 0, self._logits.dtype.type, shape, self._logits.ctypes.data)

    def _bind_inputs(self, binding: Any, ids: Array, mask: Array, places: Array) -> None:
        """Bind what is fed, anew at every pass: a binding to another device copies at once. It keeps the arrays."""
        for name, array in (("input_ids", ids), ("attention_mask", mask), ("position_ids", places)):
            if name in self._graph.inputs:
                binding.bind_cpu_input(name, array.astype(self._graph.dtype(name)))


def _copied(target: Array, source: Array, rows: Sequence[int], used: int) -> Array:
    """`target` [B, H, C, D] with the rows of `source`, of which `used` places of C hold something."""
    moved = target.ctypes.data != source.ctypes.data
    for new, old in enumerate(rows):
        if moved or new != old:
            target[new, :, :used] = source[old, :, :used]
    return target


class GrowingCache:
    """Pasts that the graph concatenates with what it reads: the presents of one pass are the pasts of the next.

    All rows have one length, so prompts are padded; `fixed` inputs (an encoder's keys and values) stay as they are.
    """

    def __init__(
        self, graph: Graph, heads: int, head_dim: int, batch: int, fixed: Mapping[str, Any] | None = None
    ) -> None:
        self._graph = graph
        self._names = cache_names(graph)
        self._values = {
            name: graph.value(np.zeros((batch, heads, 0, head_dim), graph.dtype(name))) for name in self._names
        }
        self._fixed = dict(fixed or {})

    def forward(self, inputs: Mapping[str, Array]) -> Array:
        """Read tokens. `inputs` holds what the graph takes beside its cache; gives the last token's logits [B, V]."""
        binding = self._graph.session.io_binding()
        arrays = {name: self._graph.cast(name, array) for name, array in inputs.items()}
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        for name, value in {**self._fixed, **self._values}.items():
            binding.bind_ortvalue_input(name, value)
        for present in self._names.values():
            binding.bind_output(present, self._graph.device, self._graph.device_id)
        binding.bind_output("logits", "cpu")
        self._graph.call(lambda: self._graph.session.run_with_iobinding(binding))
        *presents, logits = binding.get_outputs()
        self._values = dict(zip(self._names, presents, strict=True))
        return np.array(logits.numpy()[:, -1], np.float32)  # a copy: the others are let go

    def absorb(self, other: GrowingCache) -> None:
        """Take another cache's rows in, after the own ones; the shorter of the two is padded on the left."""
        for name, value in self._values.items():
            both = [value.numpy(), other._values[name].numpy()]
            longest = max(part.shape[2] for part in both)
            both = [np.pad(part, ((0, 0), (0, 0), (longest - part.shape[2], 0), (0, 0))) for part in both]
            self._values[name] = self._graph.value(np.concatenate(both))

    def reorder(self, rows: Sequence[int], fixed: bool = False) -> None:
        """Make the new row i a copy of the old row rows[i]; `fixed` does it for the fixed inputs too."""
        for values in (self._values, self._fixed) if fixed else (self._values,):
            for name, value in values.items():
                values[name] = self._graph.value(np.ascontiguousarray(value.numpy()[list(rows)]))
