"""`/v1/embeddings` and `/v1/classify`: texts through an encoder, a batch at a time."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np

from pipeline.engine import Array
from pipeline.serve.completions import Server, texts_or_ids
from pipeline.serve.problems import BadRequest
from pipeline.serve.served import Served

_BATCH_TOKENS = 8192
"""Padded tokens of one pass: between two passes, other requests have their turn."""


async def embeddings(server: Server, body: Mapping[str, Any]) -> dict[str, Any]:
    """A vector for each text, as the model pools and normalises it."""
    ids = _ids(server.served, body)
    vectors = await _all(server, ids)
    if body.get("encoding_format") == "base64":
        shown: list[Any] = [base64.b64encode(each.astype("<f4").tobytes()).decode() for each in vectors]
    else:
        shown = [each.astype(float).tolist() for each in vectors]
    data = [{"object": "embedding", "index": place, "embedding": each} for place, each in enumerate(shown)]
    return {"object": "list", "data": data, "model": server.served.name, "usage": _usage(ids)}


async def classify(server: Server, body: Mapping[str, Any]) -> dict[str, Any]:
    """The likeliest label of each text, and the probabilities of all of them."""
    served = server.served
    ids = _ids(served, body)
    data = []
    for place, logits in enumerate(await _all(server, ids)):
        weights = np.exp(logits.astype(np.float64) - logits.max())
        probabilities = weights / weights.sum()
        best = int(probabilities.argmax())
        label = served.labels[best] if best < len(served.labels) else str(best)
        found = {"index": place, "label": label, "probs": probabilities.tolist(), "num_classes": len(probabilities)}
        data.append(found)
    return {"object": "list", "data": data, "model": served.name, "usage": _usage(ids)}


def _ids(served: Served, body: Mapping[str, Any]) -> list[list[int]]:
    found = texts_or_ids(served, body["input"], "input")
    most = served.context_length
    if most and (longest := max(map(len, found))) > most:
        raise BadRequest(f"input: a text of {longest} tokens, and the model reads {most}", param="input")
    return found


def _usage(ids: Sequence[Sequence[int]]) -> dict[str, int]:
    count = sum(map(len, ids))
    return {"prompt_tokens": count, "total_tokens": count}


async def _all(server: Server, ids: Sequence[Sequence[int]]) -> list[Array]:
    """The answer to every text, in order. Texts of like length go together."""
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    found: dict[int, Array] = {}
    at = 0
    while at < len(order):
        size = 1
        while at + size < len(order) and (size + 1) * len(ids[order[at + size]]) <= _BATCH_TOKENS:
            size += 1
        places = order[at : at + size]
        batch = [ids[place] for place in places]
        call: Future[Any] = server.scheduler.call(partial(encode_batch, server.served, batch))
        found |= dict(zip(places, await asyncio.wrap_future(call), strict=True))
        at += size
    return [found[place] for place in range(len(ids))]


def encode_batch(served: Served, batch: Sequence[Sequence[int]]) -> Array:
    """[B, H] vectors or logits of texts. For the engine's thread."""
    longest = max(map(len, batch))
    input_ids = np.zeros((len(batch), longest), np.int64)
    mask = np.zeros_like(input_ids)
    for row, ids in enumerate(batch):
        input_ids[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    outputs = served.engine.run({"input_ids": input_ids, "attention_mask": mask})
    for name in ("sentence_embedding", "logits"):
        if name in outputs:
            return outputs[name]
    # Without a pooling of its own, the mean of the tokens' vectors stands for a text.
    weights = mask[..., None] / mask.sum(axis=1)[:, None, None]
    found: Array = (outputs["last_hidden_state"] * weights).sum(axis=1, dtype=np.float64).astype(np.float32)
    return found
