"""Hold an engine against stored reference outputs: every forward pass, padding, and the greedy continuations.

Legend: B batch, T tokens, V vocabulary. Forward passes run sample by sample without padding, as the reference did; the
check of padding then runs samples of unequal length together. Prompts are continued together, in one batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.engine import Array, Engine, Sampling
from pipeline.errors import StageError
from pipeline.parity import divergence, similarity
from pipeline.parity.padding import padding_gap
from pipeline.parity.runner import Runner, guarded, output, same_shape
from pipeline.parity.stored import Stored
from pipeline.step import Progress, silent

JUDGED = (("sentence_embedding",), ("start_logits", "end_logits"), ("logits",), ("last_hidden_state",))
"""Which outputs of an encoder its metrics are about: the first of these that the engine gives."""

_DECODE_CHECKED = 2  # prompts whose decode path is compared with a forward pass
_CONTEXT = 12  # tokens that `worst` shows


@dataclass
class Judgement:
    """What was measured."""

    metrics: dict[str, float] = field(default_factory=dict)
    """May hold NaN and infinity; `finite` makes them fit for JSON."""
    worst: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By kind of fault: where, with the value and the token ids around it."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """One entry a sample."""
    outputs: dict[str, dict[str, float]] = field(default_factory=dict)
    """Encoders: output name -> metrics, of every output that both sides have."""
    kld: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Language models: KL divergence of every scored position, in nats."""
    rows: int = 0
    """How many positions (language models) or rows of the judged outputs (encoders) the metrics are about."""


def judge(
    stored: Stored,
    engine: Engine,
    batch: int = 4,
    accepts: Collection[str] | None = None,
    progress: Progress = silent,
) -> Judgement:
    """Measure an engine. `batch` samples run together in the check of padding.

    `accepts` names the inputs that the engine takes (its interface); None passes all that are stored. Raises
    StageError when the engine fails, or when its outputs do not have the reference's names and shapes.
    """
    run = Runner(engine, None if stored.kind == "decoder" else accepts)
    if stored.kind == "encoder":
        found = _judge_encoder(stored, run, progress)
    else:
        found = _judge_logits(stored, run, progress)
        _judge_greedy(stored, engine, run, found)
    found.metrics["padding_max_abs"] = padding_gap(stored, run, max(2, batch))
    if found.metrics["nonfinite"]:
        # An engine that gives NaN passes nothing, not even where its continuation happens to be right.
        found.metrics = dict.fromkeys(found.metrics, math.nan) | {"nonfinite": found.metrics["nonfinite"]}
    return found


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """The same numbers with None for NaN and infinity, which JSON cannot say and no gate lets pass."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _judge_logits(stored: Stored, run: Runner, progress: Progress) -> Judgement:
    out, scores = Judgement(), []
    tokens = "decoder_input_ids" if stored.kind == "seq2seq" else "input_ids"
    for index in range(stored.samples):
        progress(index, stored.samples, "samples")
        inputs = stored.inputs(index)
        first, reference = stored.output("logits", index)
        ids = inputs[tokens][0]
        got = same_shape(output(run(inputs, f"sample {index}"), "logits"), (len(ids), reference.shape[1]), "logits")
        mask = inputs["attention_mask"][0] if stored.kind == "decoder" else np.ones_like(ids)
        score = divergence.score(reference, got[first : first + len(reference)], ids, mask, first)
        scores.append(score)
        own = divergence.summarise([score])
        shown = ("kld_mean", "kld_max", "top1", "perplexity")
        out.samples.append({"sample": index, **finite({name: own[name] for name in shown if name in own})})
        if score.nonfinite:
            _keep_worst(out.worst, "nonfinite", score.nonfinite, sample=index)
        elif len(score.kld):
            at = int(score.positions[score.kld.argmax()])
            shown_ids = ids[max(0, at - _CONTEXT + 1) : at + 1].tolist()
            _keep_worst(out.worst, "kld", float(score.kld.max()), sample=index, position=at, token_ids=shown_ids)
    out.metrics = divergence.summarise(scores)
    out.kld = np.concatenate([score.kld for score in scores])
    out.rows = len(out.kld)
    progress(stored.samples, stored.samples, "samples")
    return out


def _judge_greedy(stored: Stored, engine: Engine, run: Runner, out: Judgement) -> None:
    greedy = stored.greedy()
    if greedy is None or not greedy.tokens:
        return
    prompts: Any = greedy.prompts
    if prompts is None:
        # Prompts that are not text are the model's inputs by name, as engines of speech take them.
        starts = [stored.inputs(index) for index in range(len(greedy.tokens))]
        names = [name for name in stored.info["inputs"] if name != "decoder_input_ids"]
        prompts = {name: np.concatenate([start[name] for start in starts]) for name in names}
    eos = tuple(int(token) for token in stored.info["eos_token_ids"])
    sampling = Sampling(max_new_tokens=greedy.new_tokens, eos_token_ids=eos)
    answers: list[list[int]] = [[] for _ in greedy.tokens]
    logprobs: list[list[float]] = [[] for _ in greedy.tokens]
    for token in guarded(lambda: list(engine.generate(prompts, sampling)), "the greedy continuations"):
        answers[token.prompt].append(int(token.token_id))
        logprobs[token.prompt].append(float(token.logprob))
    out.metrics.update(divergence.greedy(greedy.tokens, answers))
    for index, (expected, answer) in enumerate(zip(greedy.tokens, answers, strict=True)):
        prefix = divergence.equal_prefix(expected, answer)
        if answer != expected:
            _keep_worst(out.worst, "greedy", -prefix, prompt=index, prefix=prefix, reference=expected, engine=answer)
    if "greedy" in out.worst:
        out.worst["greedy"]["value"] = out.worst["greedy"]["prefix"]
    if stored.kind == "decoder":
        checked = range(min(_DECODE_CHECKED, len(prompts)))
        gaps = [_decode_gap(run, prompts[index], answers[index], logprobs[index]) for index in checked]
        out.metrics["decode_max_abs"] = float(np.max(gaps))


def _decode_gap(run: Runner, prompt: list[int], answer: list[int], logprobs: list[float]) -> float:
    """How far the log-probabilities of the decode path are from those of one forward pass over the same tokens."""
    ids = np.array([[*prompt, *answer]], np.int64)
    logits = output(run({"input_ids": ids, "attention_mask": np.ones_like(ids)}, "a continuation"), "logits")[0]
    rows = np.asarray(logits[len(prompt) - 1 : -1], np.float64)
    with np.errstate(all="ignore"):
        expected = divergence.log_softmax(rows)[np.arange(len(answer)), answer]
    return float(np.max(np.abs(expected - np.array(logprobs)), initial=0.0))


def _judge_encoder(stored: Stored, run: Runner, progress: Progress) -> Judgement:
    out = Judgement()
    rows: dict[str, list[similarity.Rows]] = {}
    embeddings: tuple[list[Array], list[Array]] = [], []
    judged: tuple[str, ...] = ()
    for index in range(stored.samples):
        progress(index, stored.samples, "samples")
        inputs = stored.inputs(index)
        got = run(inputs, f"sample {index}")
        judged = judged or _judged(stored, got)
        for name in stored.outputs:
            if name not in got:
                continue
            first, reference = stored.output(name, index)
            length = stored.length(name, index)
            shape = reference.shape if length is None else (length, *reference.shape[1:])
            whole = same_shape(output(got, name), shape, name)
            candidate = whole[first : first + len(reference)] if length is not None else whole
            rows.setdefault(name, []).append(similarity.compare(reference, candidate))
            if stored.task == "feature-extraction" and name == judged[0]:
                for side, array in zip(embeddings, (reference, candidate), strict=True):
                    side.append(array if array.ndim == 1 else array.mean(axis=0))
        own = [rows[name][-1] for name in judged]
        values = similarity.summarise(own)
        out.samples.append(
            {"sample": index, **finite({name: values[name] for name in ("cosine_min", "max_abs_error")})}
        )
        for name, part in zip(judged, own, strict=True):
            if part.nonfinite:
                _keep_worst(out.worst, "nonfinite", part.nonfinite, sample=index, output=name)
            else:
                at = int(part.cosine.argmin())
                ids = {"token_ids": inputs["input_ids"][0][:_CONTEXT].tolist()} if "input_ids" in inputs else {}
                _keep_worst(out.worst, "cosine", 1 - float(part.cosine[at]), sample=index, output=name, row=at, **ids)
    if "cosine" in out.worst:
        out.worst["cosine"]["value"] = 1 - out.worst["cosine"]["value"]
    out.metrics = similarity.summarise([part for name in judged for part in rows[name]])
    out.outputs = {name: similarity.summarise(parts) for name, parts in rows.items()}
    out.rows = sum(len(part.cosine) for name in judged for part in rows[name])
    if stored.task == "feature-extraction":
        for values in (out.metrics, *out.outputs.values()):
            del values["top1"]  # where an embedding is largest means nothing
    # A broken output fails the engine even where another one is judged.
    out.metrics["nonfinite"] = sum(values["nonfinite"] for values in out.outputs.values())
    if embeddings[0]:
        correlation = similarity.spearman(np.stack(embeddings[0]), np.stack(embeddings[1]))
        if correlation is not None:
            out.metrics["spearman"] = correlation
    progress(stored.samples, stored.samples, "samples")
    return out


def _judged(stored: Stored, got: Mapping[str, Array]) -> tuple[str, ...]:
    for names in JUDGED:
        if all(name in stored.outputs and name in got for name in names):
            return names
    raise StageError(
        f"the engine gives {', '.join(got) or 'nothing'}, and the reference {', '.join(stored.outputs)}",
        hint="the export and the reference disagree on the task: set the model's task in the recipe",
    )


def _keep_worst(worst: dict[str, dict[str, Any]], kind: str, value: float, **where: Any) -> None:
    if kind not in worst or value > worst[kind]["value"]:
        worst[kind] = {**where, "value": value}
