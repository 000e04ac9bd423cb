"""A model whose every answer is known: the logits after a token are that token's row of a table.

It is causal, and padding cannot matter, so that each metric has a closed form. Faults can be switched on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engine import Array, Sampling, Token
from pipeline.parity.divergence import log_softmax
from pipeline.parity.stored import NpyWriter, write_json

VOCAB, HIDDEN, START = 50, 8, 1


def table(seed: int = 0, width: int = VOCAB) -> Array:
    """[VOCAB, width]: the logits (or the vector) of each token."""
    return np.random.Generator(np.random.PCG64(seed)).normal(0, 3, (VOCAB, width)).astype(np.float32)


class Bigram:
    """A decoder. Settings: `noise` (standard deviation), `shift` (added to every logit), `nan`, `vocab`,
    `padding_bug` (what is added when a row is padded), `decode_bug` (what is added in generation), `flip` (the token
    with the second best logit is chosen in generation), `fail` (raise)."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        noise = np.random.Generator(np.random.PCG64(9)).normal(0, settings.get("noise", 0), (VOCAB, VOCAB))
        self.table = (table() + noise + settings.get("shift", 0)).astype(np.float32)
        if settings.get("nan"):
            self.table[3, 7] = settings["nan"]

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        if self.settings.get("fail"):
            raise RuntimeError("out of nodes")
        ids = inputs["decoder_input_ids"] if "decoder_input_ids" in inputs else inputs["input_ids"]
        logits = self.table[ids]
        if "decoder_input_ids" not in inputs:
            padded = (inputs["attention_mask"] == 0).any(axis=1)
            logits = logits + np.float32(self.settings.get("padding_bug", 0)) * padded[:, None, None]
        return {"logits": logits[..., : self.settings.get("vocab", VOCAB)]}

    def generate(self, prompts: Any, sampling: Sampling) -> Iterator[Token]:
        """Token ids, or the inputs of a seq2seq model by name. `start`: the decoder begins with it, not the prompt."""
        if isinstance(prompts, Mapping):
            prompts = list(prompts["input_features"])
        for index, prompt in enumerate(prompts):
            first = self.settings.get("start", prompt[-1])
            for token, logprob in self.greedy(first, sampling.max_new_tokens, sampling.eos_token_ids or ()):
                yield Token(index, token, logprob, False)

    def greedy(self, last: int, count: int, eos: Sequence[int]) -> Iterator[tuple[int, float]]:
        for _ in range(count):
            with np.errstate(all="ignore"):
                logp = log_softmax(self.table[last].astype(np.float64))
            last = int(np.argsort(logp)[-2 if self.settings.get("flip") else -1])
            yield last, float(logp[last]) + self.settings.get("decode_bug", 0)
            if last in eos:
                return


class Vectors:
    """An encoder: `last_hidden_state` is a table's rows, `sentence_embedding` their mean. Settings: `noise`, `nan`,
    `scale`, `padding_bug`, `without` (names of outputs that it does not give)."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        noise = np.random.Generator(np.random.PCG64(9)).normal(0, settings.get("noise", 0), (VOCAB, HIDDEN))
        self.table = ((table(1, HIDDEN) + noise) * settings.get("scale", 1)).astype(np.float32)
        if settings.get("nan"):
            self.table[3] = np.nan

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        states, mask = self.table[inputs["input_ids"]], inputs["attention_mask"][..., None]
        weights = np.ones_like(mask) if self.settings.get("padding_bug") else mask
        pooled = (states * weights).sum(axis=1) / weights.sum(axis=1)
        found = {"last_hidden_state": states, "sentence_embedding": pooled.astype(np.float32)}
        return {name: array for name, array in found.items() if name not in self.settings.get("without", ())}

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Token]:
        raise NotImplementedError


def open_engine(folder: Path, settings: Mapping[str, Any] | None = None) -> Bigram | Vectors:
    """The opener that the tests of stage `parity` name. A file called `encoder` in the folder makes it Vectors."""
    return (Vectors if (folder / "encoder").exists() else Bigram)(**(settings or {}))


def write_decoder(path: Path, samples: int = 6, length: int = 40, prompts: int = 3, new_tokens: int = 10) -> Path:
    """The reference of an exact Bigram."""
    path.mkdir(parents=True, exist_ok=True)
    ids = np.random.Generator(np.random.PCG64(1)).integers(4, VOCAB, (samples, length))
    texts = [row[: 3 + index].tolist() for index, row in enumerate(ids[:prompts])]
    exact = Bigram()
    tokens = [[token for token, _ in exact.greedy(text[-1], new_tokens, (2,))] for text in texts]
    write_json(path / "greedy.json", {"prompts": texts, "new_tokens": new_tokens, "tokens": tokens})
    arrays = {"inputs.input_ids": list(ids), "inputs.attention_mask": list(np.ones_like(ids))}
    return _write(path, "text-generation", "decoder", {**arrays, "outputs.logits": list(exact.table[ids])})


def write_seq2seq(path: Path, speech: bool = False) -> Path:
    """The reference of an exact Bigram that a decoder fed from START consults; the encoder's inputs do not matter."""
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.PCG64(1))
    fed = [np.array([START, *rng.integers(4, VOCAB, 6 + index)]) for index in range(4)]
    exact = Bigram()
    answer = [token for token, _ in exact.greedy(START, 5, (2,))]
    texts = [rng.integers(4, VOCAB, 3 + index) for index in range(4)]
    prompts = None if speech else [text.tolist() for text in texts[:3]]
    write_json(path / "greedy.json", {"prompts": prompts, "new_tokens": 5, "tokens": [answer] * 3})
    arrays: dict[str, Sequence[Array]] = {"inputs.decoder_input_ids": fed}
    if speech:
        arrays["inputs.input_features"] = list(rng.normal(size=(4, 5, 7)).astype(np.float32))
    else:
        arrays |= {"inputs.input_ids": texts, "inputs.attention_mask": [np.ones_like(text) for text in texts]}
    arrays["outputs.logits"] = [exact.table[row] for row in fed]
    task = "automatic-speech-recognition" if speech else "text2text-generation"
    return _write(path, task, "seq2seq", arrays)


def write_encoder(path: Path, samples: int = 6, length: int = 12) -> Path:
    """The reference of exact Vectors, with samples of unequal length."""
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.PCG64(1))
    ids = [rng.integers(4, VOCAB, length - index % 5) for index in range(samples)]
    found = [Vectors().run({"input_ids": row[None], "attention_mask": np.ones_like(row)[None]}) for row in ids]
    return _write(
        path,
        "feature-extraction",
        "encoder",
        {
            "inputs.input_ids": ids,
            "inputs.attention_mask": [np.ones_like(row) for row in ids],
            "outputs.last_hidden_state": [each["last_hidden_state"][0] for each in found],
            "outputs.sentence_embedding": [each["sentence_embedding"][0] for each in found],
        },
    )


def _write(path: Path, task: str, kind: str, arrays: Mapping[str, Sequence[Array]]) -> Path:
    lengths = {}
    for stem, rows in arrays.items():
        shape = (len(rows), max(map(len, rows)), *rows[0].shape[1:])
        with NpyWriter(path / f"{stem}.npy", shape, rows[0].dtype) as file:
            for row in rows:
                file.append(row)
        if stem not in ("outputs.sentence_embedding", "inputs.input_features"):
            lengths[stem.partition(".")[2]] = list(map(len, rows))
    names = {side: [s.partition(".")[2] for s in arrays if s.startswith(side)] for side in ("inputs", "outputs")}
    info = {"task": task, "kind": kind, **names, "source": "random", "samples": len(next(iter(lengths.values())))}
    info |= {"eos_token_ids": [2], "decoder_start_token_id": None, "lengths": lengths, "kept": {}}
    write_json(path / "reference.json", info)
    return path
