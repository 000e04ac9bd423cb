"""The Engine of a decoder whose KV cache is a buffer of fixed length: the loop, whatever runs the graph.

Each row's tokens lie packed from place 0 of its own row. Prompts are read one by one, in pieces of at most `chunk`
tokens; then the rows go on together. What a row holds beyond its length is never seen.

Legend: B rows, S tokens fed at once, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pipeline.decoding import decode
from pipeline.engine import Array, Sampling, Token
from pipeline.errors import RecipeError
from pipeline.targets.ort_decoder import Shape, check_ids, rolled, starts, token_inputs


class Buffers(Protocol):
    """Caches of one batch in whatever memory the runtime wants."""

    def forward(self, ids_BS: Array, places_B: Array) -> Array:
        """Feed tokens that begin at each row's place; the caches take them in. Returns logits [B, S, V] float32."""
        ...

    def reorder(self, rows: Sequence[int]) -> None:
        """Make the new row i a copy of the old row rows[i]."""
        ...

    def put(self, row: int, other: Any) -> None:
        """Copy the only row of other buffers into a row of these."""
        ...


class Graph(Protocol):
    """A graph with a static cache."""

    @property
    def largest_batch(self) -> int: ...
    @property
    def chunk(self) -> int:
        """How many tokens may be fed at once."""
        ...

    def buffers(self, batch: int) -> Buffers:
        """Empty caches for so many rows."""
        ...


class StaticDecoder:
    """The Engine of a text-generation artifact with a static cache."""

    def __init__(self, graph: Graph, shape: Shape) -> None:
        self._graph, self._shape = graph, shape
        assert shape.context_length is not None
        self._length: int = shape.context_length

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """`input_ids` [B, T] and `attention_mask` [B, T] (0 = padding, on either side; may be absent) -> `logits`
        [B, T, V] float32. What stands at padding has no meaning."""
        ids, mask = token_inputs(inputs, self._shape.vocab_size)
        if ids.shape[1] > self._length:
            raise RecipeError(
                f"{ids.shape[1]} tokens do not fit the engine's cache of {self._length}",
                hint="shorten the input, or build with a longer `cache_length`",
            )
        first = starts(mask)
        ids = rolled(ids, first)
        groups = range(0, len(ids), self._graph.largest_batch)
        logits = np.concatenate([self._forward(ids[at : at + self._graph.largest_batch]) for at in groups])
        return {"logits": rolled(logits, -first)}

    def _forward(self, ids_BT: Array) -> Array:
        buffers = self._graph.buffers(len(ids_BT))
        parts = []
        for start in range(0, ids_BT.shape[1], self._graph.chunk):
            places = np.full(len(ids_BT), start, np.int64)
            parts.append(buffers.forward(ids_BT[:, start : start + self._graph.chunk], places))
        return np.concatenate(parts, axis=1)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Token]:
        """Token ids in, tokens out, each at most to the end of the cache. See `pipeline.decoding`."""
        if isinstance(prompts, Mapping):
            raise RecipeError("a decoder's prompts are lists of token ids", hint="inputs by name are for others")
        check_ids(prompts, self._shape.vocab_size)
        together = self._graph.largest_batch // max(1, sampling.beams)
        if not together:
            raise RecipeError(
                f"{sampling.beams} beams do not fit the engine's largest batch of {self._graph.largest_batch}",
                hint="ask for fewer beams, or build with a larger `batch`",
            )
        stepper, ends = _Stepper(self._graph), self._shape.eos_token_ids
        for at in range(0, len(prompts), together):
            some = prompts[at : at + together]
            for token in decode(stepper, some, some, sampling, eos_token_ids=ends, context_length=self._length):
                yield token._replace(prompt=token.prompt + at)


class _State:
    def __init__(self, buffers: Buffers, lengths: Array) -> None:
        self.buffers, self.lengths = buffers, lengths


class _Stepper:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[_State, Array]:
        buffers, last = self._graph.buffers(len(prompts)), []
        for row, prompt in enumerate(prompts):
            one = buffers if len(prompts) == 1 else self._graph.buffers(1)
            for start in range(0, len(prompt), self._graph.chunk):
                part = np.asarray(prompt[start : start + self._graph.chunk], np.int64)[None]
                logits = one.forward(part, np.array([start], np.int64))
            last.append(np.array(logits[0, -1], np.float32))
            if one is not buffers:
                buffers.put(row, one)
        return _State(buffers, np.array([len(prompt) for prompt in prompts], np.int64)), np.stack(last)

    def step(self, state: _State, tokens: Sequence[int], rows: Sequence[int]) -> Array:
        if list(rows) != list(range(len(state.lengths))):
            state.buffers.reorder(rows)
            state.lengths = state.lengths[list(rows)]
        logits = state.buffers.forward(np.asarray(tokens, np.int64)[:, None], state.lengths)
        state.lengths = state.lengths + 1
        return logits[:, 0]
