"""What the reference is computed on: samples and prompts, from text or from a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import RecipeError, StageError
from pipeline.frozen import frozen
from pipeline.stages import samples as text
from pipeline.stages.reference import ReferenceOptions

Array = npt.NDArray[Any]
Sample = dict[str, Array]
"""Input name -> [t, ...] of one sample, without padding."""

NOT_TEXT = ("input_features", "pixel_values")
"""Inputs that are drawn by seed, always of one size."""

_PROMPT_TOKENS = 32  # the longest prompt that is cut from a sample or drawn by seed


@frozen
class Reference:
    """The loaded checkpoint and the facts of its configuration that the inputs depend on."""

    model: Any
    """The torch module, fp32 on CPU."""
    folder: Path
    task: str
    kind: str
    """decoder, seq2seq or encoder."""
    main_input: str
    """input_ids, input_features or pixel_values."""
    vocab_size: int
    eos: tuple[int, ...]
    pad: int | None
    start: int | None
    """What the decoder of an encoder-decoder begins with."""
    convoy: Any = None
    """reference_stream.Convoy, where the model's weights are read as they are needed."""

    @property
    def special(self) -> tuple[int, ...]:
        """Tokens with side effects (a mask, an end), kept out of random inputs."""
        return (*self.eos, *(token for token in (self.pad, self.start) if token is not None))

    @property
    def positions(self) -> int | None:
        """How many tokens the model has positions for; None: no limit is known."""
        name = "max_target_positions" if self.main_input == "input_features" else "max_position_embeddings"
        limit = getattr(self.model.config, name, None)
        return limit if isinstance(limit, int) and self.main_input != "pixel_values" else None

    @property
    def first(self) -> int:
        """`start`, or StageError when the checkpoint does not say."""
        if self.start is None:
            raise StageError("config.json names no decoder_start_token_id", hint="add it: every answer begins with it")
        return self.start


Answer = Callable[[Sample], list[int]]
"""The model's greedy continuation of a sample."""


def check(reference: Reference, options: ReferenceOptions, data: Path | None) -> None:
    """Refuse, before anything runs, what the model cannot take."""
    limit = reference.positions
    if limit is not None and options.length > limit:
        raise RecipeError(
            f"a length of {options.length} tokens is more than the model's {limit} positions",
            hint=f"set `length` to {limit} or less",
        )
    if data is not None and reference.main_input in NOT_TEXT:
        raise RecipeError(
            f"data are text, and the model takes {reference.main_input}",
            hint="remove the data from the recipe's parity: inputs are drawn by seed",
        )


def random_samples(reference: Reference, options: ReferenceOptions) -> list[Sample]:
    """Samples drawn by seed. All but decoders get unequal lengths, so that padding is exercised."""
    rng = np.random.Generator(np.random.PCG64([options.seed, 0]))
    config, out = reference.model.config, []
    for index in range(options.samples):
        if reference.main_input == "pixel_values":
            size = config.image_size
            height, width = size if isinstance(size, (list, tuple)) else (size, size)
            shape = (config.num_channels, height, width)
            sample: Sample = {"pixel_values": rng.standard_normal(shape, dtype=np.float32)}
        elif reference.main_input == "input_features":
            frames = 2 * config.max_source_positions  # two frames of the log-mel spectrogram make one position
            sample = {"input_features": rng.standard_normal((config.num_mel_bins, frames), dtype=np.float32)}
        else:
            shortest = options.length if reference.kind == "decoder" else max(2, options.length // 2)
            length = options.length if index == 0 else int(rng.integers(shortest, options.length + 1))
            ids = text.random_ids(rng, length, reference.vocab_size, reference.special)
            sample = text_sample(reference, ids, np.arange(length) * 2 // length)
        if reference.kind == "seq2seq":
            body = text.random_ids(rng, options.length - 1, reference.vocab_size, reference.special)
            sample["decoder_input_ids"] = np.array([reference.first, *body], np.int64)
        out.append(sample)
    return out


def data_samples(
    reference: Reference, options: ReferenceOptions, data: Path, encoder: text.Encoder, answer: Answer
) -> list[Sample]:
    """Samples from text. The decoder of an encoder-decoder is fed the model's own answer: it is what it will meet."""
    if reference.kind == "decoder":
        return [text_sample(reference, ids) for ids in text.windows(data, encoder, options.samples, options.length)]
    out = []
    for encoded in text.sequences(data, encoder, options.samples, options.length):
        sample = text_sample(reference, np.array(encoded.ids, np.int64), np.array(encoded.type_ids, np.int64))
        if reference.kind == "seq2seq":
            tokens = answer(sample)
            body = tokens[:-1] if tokens[-1] in reference.eos else tokens
            sample["decoder_input_ids"] = np.array([reference.first, *body], np.int64)
        out.append(sample)
    return out


def text_sample(reference: Reference, ids: Array, type_ids: Array | None = None) -> Sample:
    """The inputs of token ids [t]; `type_ids` are left out where the model has one type only."""
    sample = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    types = getattr(reference.model.config, "type_vocab_size", None) or 0
    if reference.kind == "encoder" and types > 1 and type_ids is not None:
        sample["token_type_ids"] = type_ids.astype(np.int64)
    return sample


def prompts(
    reference: Reference,
    options: ReferenceOptions,
    file: Path | None,
    encoder: text.Encoder | None,
    samples: Sequence[Sample] | None,
) -> list[list[int]]:
    """Prompts from a file; else the starts of the data's samples; else drawn by seed."""
    count, decoder = options.prompt_count, reference.kind == "decoder"
    if file is not None and encoder is not None:
        found = text.prompts(file, encoder, count, decoder=decoder)
    elif samples is not None:
        if len(samples) < count:
            raise RecipeError(
                f"{count} prompts are asked for, and there are {len(samples)} samples to cut them from",
                hint=f"set `prompt_count` to {len(samples)} or less, or give a file of prompts",
            )
        cut = max(1, min(_PROMPT_TOKENS, options.length // 2)) if decoder else options.length
        found = [sample["input_ids"][:cut].tolist() for sample in samples[:count]]
    else:
        rng = np.random.Generator(np.random.PCG64([options.seed, 1]))
        sizes = rng.integers(min(4, options.length), min(_PROMPT_TOKENS, options.length) + 1, size=count)
        found = [text.random_ids(rng, int(size), reference.vocab_size, reference.special).tolist() for size in sizes]
    longest, limit = max(map(len, found)), reference.positions
    needed = longest + options.new_tokens if decoder else longest
    if limit is not None and needed > limit:
        raise RecipeError(
            f"a prompt of {longest} tokens"
            + (f" and {options.new_tokens} new ones exceed" if decoder else " exceeds")
            + f" the model's {limit} positions",
            hint="shorten the prompt or lower `new_tokens`" if decoder else "shorten the prompt",
        )
    return found
