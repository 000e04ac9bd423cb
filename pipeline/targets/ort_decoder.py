"""A decoder in ONNX Runtime: one forward pass over padded batches, and generation with a KV cache.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.decoding import Decoder, decode
from pipeline.engine import Array, Sampling, Token
from pipeline.errors import RecipeError
from pipeline.frozen import frozen
from pipeline.targets.ort_cache import GrowingCache, SharedCache, cache_names
from pipeline.targets.ort_session import Graph

Prompts = Sequence[Sequence[int]]


@frozen
class Shape:
    """What engine.json says of a decoder."""

    heads: int
    """Of the keys and values."""
    head_dim: int
    vocab_size: int
    context_length: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    start_token_id: int | None
    """What the decoder of an encoder-decoder begins with."""
    shared: bool
    """Whether the cache is one buffer (`cache: gqa`) or concatenated."""

    @classmethod
    def read(cls, decoder: Mapping[str, Any]) -> Shape:
        return cls(
            heads=decoder["kv_heads"],
            head_dim=decoder["head_dim"],
            vocab_size=decoder["vocab_size"],
            context_length=decoder.get("context_length"),
            eos_token_ids=tuple(decoder["eos_token_ids"]),
            # Where padding is, the mask is 0: any token does.
            pad_token_id=decoder.get("pad_token_id") or 0,
            start_token_id=decoder.get("decoder_start_token_id"),
            shared=decoder["cache"] == "gqa",
        )


class OrtDecoder:
    """The Engine of a text-generation artifact."""

    def __init__(self, graph: Graph, shape: Shape) -> None:
        self._graph = graph
        self._shape = shape

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """`input_ids` [B, T] and `attention_mask` [B, T] (0 = padding, on either side; may be absent) -> `logits`
        [B, T, V] float32. What stands at padding has no meaning."""
        ids, mask = token_inputs(inputs, self._shape.vocab_size)
        first = None
        if self._shape.shared:
            # GroupQueryAttention takes a row's length from its mask, so its tokens must begin at the row's start.
            first = starts(mask)
            ids, mask = rolled(ids, first), rolled(mask, first)
        feeds: dict[str, Array] = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in self._graph.inputs:
            feeds["position_ids"] = positions_of(mask)
        for name in cache_names(self._graph):
            feeds[name] = np.zeros((len(ids), self._shape.heads, 0, self._shape.head_dim), self._graph.dtype(name))
        outputs = self._graph.run(["logits"], feeds)
        if first is not None:
            outputs["logits"] = rolled(outputs["logits"], -first)
        return outputs

    def generate(self, prompts: Prompts, sampling: Sampling) -> Iterator[Token]:
        """Token ids in, tokens out, each at most to the end of the context. See `pipeline.decoding`."""
        if isinstance(prompts, Mapping):
            raise RecipeError(
                "a decoder's prompts are lists of token ids", hint="inputs by name are for encoder-decoders"
            )
        decoder = self.decoder()
        check_ids(prompts, decoder.vocab_size)
        ends, context = decoder.eos_token_ids, decoder.context_length
        return decode(decoder.stepper, prompts, prompts, sampling, eos_token_ids=ends, context_length=context)

    def decoder(self) -> Decoder:
        """For those who let prompts join and leave: see `pipeline.decoding.Batch`."""
        shape = self._shape
        stepper = (_Shared if shape.shared else _Growing)(self._graph, shape)
        return Decoder(stepper, shape.vocab_size, shape.eos_token_ids, shape.context_length)


class _Shared:
    """Prompts are read one by one, without padding: measured as fast as a batch from 16 tokens a prompt on."""

    def __init__(self, graph: Graph, shape: Shape) -> None:
        self._graph = graph
        self._shape = shape

    def prefill(self, prompts: Prompts, room: int) -> tuple[SharedCache, Array]:
        capacity = max(map(len, prompts)) + room
        cache = SharedCache(
            self._graph, self._shape.heads, self._shape.head_dim, self._shape.vocab_size, len(prompts), capacity
        )
        return cache, np.stack([cache.prefill(row, ids) for row, ids in enumerate(prompts)])

    def extend(self, state: SharedCache, prompts: Prompts, room: int) -> Array:
        other, logits = self.prefill(prompts, room)
        state.absorb(other)
        return logits

    def step(self, state: SharedCache, tokens: Sequence[int], rows: Sequence[int]) -> Array:
        state.reorder(rows)
        return state.step(tokens)


@dataclass
class _Padded:
    cache: GrowingCache
    mask: Array


class _Growing:
    """Prompts are padded on the left, so that every row's last token is in the last place."""

    def __init__(self, graph: Graph, shape: Shape) -> None:
        self._graph = graph
        self._shape = shape

    def prefill(self, prompts: Prompts, room: int) -> tuple[_Padded, Array]:
        longest = max(map(len, prompts))
        ids = np.full((len(prompts), longest), self._shape.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        state = _Padded(GrowingCache(self._graph, self._shape.heads, self._shape.head_dim, len(prompts)), mask)
        return state, self._forward(state, ids)

    def extend(self, state: _Padded, prompts: Prompts, room: int) -> Array:
        other, logits = self.prefill(prompts, room)
        state.cache.absorb(other.cache)
        state.mask = joined(state.mask, other.mask)
        return logits

    def step(self, state: _Padded, tokens: Sequence[int], rows: Sequence[int]) -> Array:
        if list(rows) != list(range(len(state.mask))):
            state.cache.reorder(rows)
            state.mask = state.mask[list(rows)]
        state.mask = np.pad(state.mask, ((0, 0), (0, 1)), constant_values=1)
        return self._forward(state, np.asarray(tokens)[:, None])

    def _forward(self, state: _Padded, ids: Array) -> Array:
        feeds = {"input_ids": ids, "attention_mask": state.mask}
        if "position_ids" in self._graph.inputs:
            feeds["position_ids"] = positions_of(state.mask)[:, -ids.shape[1] :]
        return state.cache.forward(feeds)


def joined(mask: Array, other: Array) -> Array:
    """Two masks below each other, the shorter one padded on the left."""
    longest = max(mask.shape[1], other.shape[1])
    return np.concatenate([np.pad(each, ((0, 0), (longest - each.shape[1], 0))) for each in (mask, other)])


def check_ids(prompts: Prompts, vocab_size: int) -> None:
    """Refuse token ids that the vocabulary does not have. Raises RecipeError naming the prompt."""
    for index, prompt in enumerate(prompts):
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise RecipeError(
                    f"prompt {index} has the token {token}, and the vocabulary ends at {vocab_size - 1}",
                    hint="use the tokenizer that comes with the artifact",
                )


def token_inputs(inputs: Mapping[str, Array], vocab_size: int) -> tuple[Array, Array]:
    """input_ids and attention_mask (ones if absent), both [B, T]. Raises RecipeError for others or wrong shapes."""
    unknown = set(inputs) - {"input_ids", "attention_mask"}
    if unknown or "input_ids" not in inputs:
        raise RecipeError(
            f"a decoder takes input_ids and attention_mask, not {', '.join(sorted(inputs)) or 'nothing'}",
            hint="positions and the cache are the engine's own business",
        )
    ids = np.asarray(inputs["input_ids"])
    mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids)))
    if ids.ndim != 2 or ids.size == 0 or mask.shape != ids.shape:
        raise RecipeError(f"input_ids {ids.shape} and attention_mask {mask.shape} must both be [batch, tokens]")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise RecipeError(f"input_ids are between {ids.min()} and {ids.max()}, the vocabulary has {vocab_size} tokens")
    return ids, mask


def positions_of(mask: Array) -> Array:
    """Place of every token among its row's tokens, 0 at the padding before them."""
    return np.asarray(np.maximum(mask.cumsum(axis=1) - 1, 0))


def starts(mask: Array) -> Array:
    """Place of every row's first token. Raises RecipeError where a row has none, or padding in its middle."""
    first = (mask != 0).argmax(axis=1)
    seen = rolled(mask, first) != 0
    if not seen[:, 0].all() or (np.diff(seen.astype(np.int8), axis=1) > 0).any():
        raise RecipeError(
            "attention_mask has a row without tokens, or with padding between tokens",
            hint="put padding at the start or at the end of a row",
        )
    return np.asarray(first)


def rolled(array: Array, first: Array) -> Array:
    """Every row [T, ...] turned so that the place first[row] comes to the start."""
    if not first.any():
        return array
    return np.stack([np.roll(row, -int(by), axis=0) for row, by in zip(array, first, strict=True)])
