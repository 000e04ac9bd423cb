"""The recipe's calibration data as inputs of an OpenVINO model, one sample at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from pipeline.stages import samples as text
from pipeline.stages.checkpoint import read_json
from pipeline.step import Inputs


def samples(
    inputs: Inputs, engine: Mapping[str, Any], names: Collection[str], count: int, length: int
) -> Iterator[dict[str, Any]]:
    """inputs: model, calibration. Name -> [1, T] for those of `names` that text gives, a sample after the other.

    Decoders read windows of running text, the rest a line each. RecipeError when the data are empty, too few or not
    UTF-8.
    """
    config = read_json(inputs["model"] / "config.json")
    encoder = text.load_encoder(inputs["model"], int(config["vocab_size"]))
    length = min(length, int(config.get("max_position_embeddings") or length))
    data = text.data_file(inputs["calibration"])
    if engine["kind"] == "decoder":
        found = [(ids.tolist(), [0] * len(ids)) for ids in text.windows(data, encoder, count, length)]
    else:
        found = [(sample.ids, sample.type_ids) for sample in text.sequences(data, encoder, count, length)]
    for ids, types in found:
        ids_1T = np.array([ids], np.int64)
        given = {
            "input_ids": ids_1T,
            "attention_mask": np.ones_like(ids_1T),
            "token_type_ids": np.array([types], np.int64),
            "position_ids": np.arange(ids_1T.shape[1])[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        yield {name: value for name, value in given.items() if name in names}
