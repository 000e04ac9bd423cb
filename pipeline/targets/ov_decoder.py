"""A stateful decoder in OpenVINO: one forward pass over padded batches, and generation with the cache inside the model.

Two forms of one model are opened when they are first asked for: all logits for `run`, the last token's for `generate`,
which is the one that serves and that the blob holds. They map the same weights.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.decoding import Decoder, decode
from pipeline.engine import Array, Sampling, Token
from pipeline.errors import RecipeError
from pipeline.stages.openvino.graphs import last_logits_only
from pipeline.stages.openvino.settings import Settings
from pipeline.targets.ort_decoder import check_ids, joined, positions_of, token_inputs
from pipeline.targets.ov_session import Graph, open_graph, runtime

Prompts = Sequence[Sequence[int]]


class OvDecoder:
    """The Engine of a text-generation artifact."""

    def __init__(self, folder: Path, engine: Mapping[str, Any], settings: Settings) -> None:
        self._folder = folder
        self._engine = engine
        self._settings = settings
        self._decoder: Mapping[str, Any] = engine["decoder"]
        self._vocab_size = int(self._decoder["vocab_size"])

    @cached_property
    def _whole(self) -> Graph:
        return open_graph(self._folder, self._engine, self._settings)

    @cached_property
    def _serving(self) -> Graph:
        if "_whole" in vars(self) and not self._engine.get("compiled"):
            return self._whole  # it answers the same, and a second form would pack all weights once more
        return open_graph(self._folder, self._engine, self._settings, change=last_logits_only, answers="last")

    @property
    def source(self) -> str:
        """`blob` or `ir`: where what generates came from."""
        return self._serving.source

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """`input_ids` [B, T] and `attention_mask` [B, T] (0 = padding, on either side; may be absent) -> `logits`
        [B, T, V] float32. What stands at padding has no meaning."""
        ids, mask = token_inputs(inputs, self._vocab_size)
        outputs = self._whole.infer(self._whole.request(), feeds(self._whole, ids, mask, range(len(ids))))
        return {"logits": outputs["logits"]}

    def generate(self, prompts: Prompts, sampling: Sampling) -> Iterator[Token]:
        """Token ids in, tokens out, each at most to the end of the context. See `pipeline.decoding`."""
        if isinstance(prompts, Mapping):
            raise RecipeError(
                "a decoder's prompts are lists of token ids", hint="inputs by name are for encoder-decoders"
            )
        check_ids(prompts, self._vocab_size)
        decoder = self.decoder()
        ends, context = decoder.eos_token_ids, decoder.context_length
        return decode(decoder.stepper, prompts, prompts, sampling, eos_token_ids=ends, context_length=context)

    def decoder(self) -> Decoder:
        """For those who let prompts join and leave: see `pipeline.decoding.Batch`."""
        told = self._decoder
        stepper = _Stepper(self._serving, told.get("pad_token_id") or 0)
        return Decoder(stepper, self._vocab_size, tuple(told["eos_token_ids"]), told.get("context_length"))


def feeds(graph: Graph, ids: Array, mask: Array, rows: Sequence[int]) -> dict[str, Array]:
    """The model's inputs: the new ids [B, S], the mask of all tokens [B, T], and the old row of every row."""
    given = {"input_ids": ids, "attention_mask": mask, "beam_idx": np.asarray(rows, np.int32)}
    if "position_ids" in graph.inputs:
        given["position_ids"] = positions_of(mask)[:, -ids.shape[1] :]
    return given


@dataclass
class _Running:
    request: Any
    mask: Array


class _Stepper:
    """Prompts are padded on the left, so that every row's last token is in the last place."""

    def __init__(self, graph: Graph, pad_token_id: int) -> None:
        self._graph = graph
        self._pad_token_id = pad_token_id

    def prefill(self, prompts: Prompts, room: int) -> tuple[_Running, Array]:
        longest = max(map(len, prompts))
        ids = np.full((len(prompts), longest), self._pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        state = _Running(self._graph.request(), mask)
        return state, self._forward(state, ids, range(len(prompts)))

    def extend(self, state: _Running, prompts: Prompts, room: int) -> Array:
        other, logits = self.prefill(prompts, room)
        tensor = runtime().Tensor
        # A new request takes both states: what is written into one that has run is laid out for its old rows.
        request = self._graph.request()
        theirs = {each.name: each.state.data for each in other.request.query_state()}
        mine = {each.name: each.state.data for each in state.request.query_state()}
        for each in request.query_state():
            each.state = tensor(_joined(mine[each.name], theirs[each.name]))
        state.request, state.mask = request, joined(state.mask, other.mask)
        return logits

    def step(self, state: _Running, tokens: Sequence[int], rows: Sequence[int]) -> Array:
        state.mask = np.pad(state.mask[list(rows)], ((0, 0), (0, 1)), constant_values=1)
        return self._forward(state, np.asarray(tokens, np.int64)[:, None], rows)

    def _forward(self, state: _Running, ids: Array, rows: Sequence[int]) -> Array:
        outputs = self._graph.infer(state.request, feeds(self._graph, ids, state.mask, rows))
        last: Array = outputs["logits"][:, -1]
        return last


def _joined(mine: Array, theirs: Array) -> Array:
    """Two states [B, H, T, D] as one, the shorter of the two padded on the left."""
    longest = max(mine.shape[2], theirs.shape[2])
    parts = [np.pad(each, ((0, 0), (0, 0), (longest - each.shape[2], 0), (0, 0))) for each in (mine, theirs)]
    return np.ascontiguousarray(np.concatenate(parts))
