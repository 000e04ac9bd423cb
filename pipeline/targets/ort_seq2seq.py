"""An encoder-decoder in ONNX Runtime: text to text, or speech to text.

The encoder runs once and gives the keys and values of every cross-attention; the decoder has its own cache beside them.

Legend: B rows, T tokens of the encoder, U tokens of the decoder, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.decoding import decode
from pipeline.engine import Array, Sampling, Token
from pipeline.errors import RecipeError
from pipeline.targets.ort_cache import GrowingCache, cache_names
from pipeline.targets.ort_decoder import Prompts, Shape, check_ids
from pipeline.targets.ort_session import Graph

DECODER_IDS = "decoder_input_ids"


@dataclass
class _Running:
    cache: GrowingCache
    owner: list[int]
    """Row -> prompt."""


class OrtSeq2Seq:
    """The Engine of a text2text-generation or automatic-speech-recognition artifact."""

    def __init__(self, encoder: Graph, decoder: Graph, shape: Shape) -> None:
        self._encoder = encoder
        self._decoder = decoder
        self._shape = shape
        self._fixed = [name for name in decoder.inputs if name in encoder.outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The encoder's inputs and `decoder_input_ids` [B, U] -> `logits` [B, U, V] float32, teacher-forced."""
        if DECODER_IDS not in inputs:
            raise RecipeError(f"an encoder-decoder needs {DECODER_IDS}", hint="begin it with decoder_start_token_id")
        ids = np.asarray(inputs[DECODER_IDS])
        check_ids([ids.ravel().tolist()], self._shape.vocab_size)
        feeds, mask = self._encoder_inputs({name: a for name, a in inputs.items() if name != DECODER_IDS})
        encoded = self._encoder.run(self._fixed, feeds)
        feeds = {"input_ids": ids, **encoded}
        if mask is not None:
            feeds["encoder_attention_mask"] = mask
        for name in cache_names(self._decoder):
            feeds[name] = np.zeros((len(ids), self._shape.heads, 0, self._shape.head_dim), self._decoder.dtype(name))
        return self._decoder.run(["logits"], feeds)

    def generate(self, prompts: Prompts | Mapping[str, Array], sampling: Sampling) -> Iterator[Token]:
        """Token ids for the encoder, or its inputs by name (`input_features` for speech), in; the decoder's tokens out.

        By name, `decoder_input_ids` [B, U] may say what the decoder has read before; else it is the start token.
        """
        inputs = dict(prompts) if isinstance(prompts, Mapping) else self._padded(prompts)
        starts = inputs.pop(DECODER_IDS, None)
        if starts is None:
            if self._shape.start_token_id is None:
                raise RecipeError("the model names no decoder_start_token_id", hint=f"give {DECODER_IDS}")
            count = len(next(iter(inputs.values()), ()))
            starts = np.full((count, 1), self._shape.start_token_id)
        history = np.asarray(starts).tolist()
        check_ids(history, self._shape.vocab_size)
        return decode(
            self,
            {**inputs, DECODER_IDS: np.asarray(starts)},
            history,
            sampling,
            eos_token_ids=self._shape.eos_token_ids,
            context_length=self._shape.context_length,
        )

    def prefill(self, prompts: Mapping[str, Array], room: int) -> tuple[_Running, Array]:
        """See `pipeline.decoding.Stepper`. The encoder's outputs stay on the session's device."""
        ids = prompts[DECODER_IDS]
        feeds, mask = self._encoder_inputs({name: a for name, a in prompts.items() if name != DECODER_IDS})
        binding = self._encoder.session.io_binding()
        arrays = {name: self._encoder.cast(name, array) for name, array in feeds.items()}
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        for name in self._fixed:
            binding.bind_output(name, self._encoder.device, self._encoder.device_id)
        self._encoder.call(lambda: self._encoder.session.run_with_iobinding(binding))
        fixed: dict[str, Any] = dict(zip(self._fixed, binding.get_outputs(), strict=True))
        if mask is not None:
            fixed["encoder_attention_mask"] = self._decoder.value(self._decoder.cast("encoder_attention_mask", mask))
        cache = GrowingCache(self._decoder, self._shape.heads, self._shape.head_dim, len(ids), fixed)
        return _Running(cache, list(range(len(ids)))), cache.forward({"input_ids": ids})

    def step(self, state: _Running, tokens: Sequence[int], rows: Sequence[int]) -> Array:
        """See `pipeline.decoding.Stepper`."""
        if list(rows) != list(range(len(state.owner))):
            owner = [state.owner[row] for row in rows]
            # Beams that change places within a prompt leave what the encoder gave as it is.
            state.cache.reorder(rows, fixed=owner != state.owner)
            state.owner = owner
        return state.cache.forward({"input_ids": np.asarray(tokens)[:, None]})

    def _padded(self, prompts: Prompts) -> dict[str, Array]:
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise RecipeError(f"prompt {index} is empty", hint="give at least one token")
        check_ids(prompts, self._shape.vocab_size)
        if "input_ids" not in self._encoder.inputs:
            raise RecipeError(
                f"the encoder takes {', '.join(self._encoder.inputs)}, not token ids", hint="give inputs by name"
            )
        longest = max(map(len, prompts), default=0)
        ids = np.full((len(prompts), longest), self._shape.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
            mask[row, : len(prompt)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def _encoder_inputs(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], Array | None]:
        """What the encoder is fed, and the mask that the decoder's cross-attention takes, if it takes one."""
        feeds = dict(inputs)
        if "input_ids" in feeds:
            feeds.setdefault("attention_mask", np.ones_like(feeds["input_ids"]))
        if set(feeds) != set(self._encoder.inputs):
            raise RecipeError(
                f"the encoder takes {', '.join(self._encoder.inputs)}; given: {', '.join(feeds) or 'nothing'}",
                hint="see the artifact's interface: `enginewright inspect`",
            )
        return feeds, feeds["attention_mask"] if "encoder_attention_mask" in self._decoder.inputs else None
