"""A request for text while it runs: its jobs in the scheduler, and what comes back of them, choice by choice."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from pipeline.decoding import Piece, limits
from pipeline.engine import Sampling
from pipeline.frozen import frozen
from pipeline.serve.answer import Choice
from pipeline.serve.metrics import Metrics, Timer
from pipeline.serve.problems import BadRequest
from pipeline.serve.scheduler import Job, Scheduler
from pipeline.serve.served import Served

_GATHER_S = 0.02
"""Between two events of a stream. Waking this thread costs the engine a part of a core, and a token of a small model
takes a third of a millisecond; what is slower than this goes out token by token."""
_MOST_SCORED = 1 << 28  # logits of a prompt that is scored, in numbers: 1 GiB


@frozen
class Wanted:
    """What a request asks of each of its prompts."""

    prompts: list[list[int]]
    sampling: Sampling
    choices: int
    most: int | None
    """New tokens; None: as many as the context has room for. 0: none."""
    stop: list[str]
    stop_tokens: frozenset[int]
    ignore_eos: bool
    logprobs: bool
    streams: bool
    """Whether each token is told when it is known."""


def sampling_of(body: Mapping[str, Any], served: Served, top_logprobs: int) -> Sampling:
    """The decoding options of a request, by the names that are the same for every endpoint."""

    def given(name: str, default: Any) -> Any:
        found = body.get(name)
        return default if found is None else found

    beams = int(given("beams", 1))
    return Sampling(
        beams=beams,
        length_penalty=float(given("length_penalty", 1.0)),
        temperature=float(given("temperature", 0.0 if beams > 1 else 1.0)),
        top_k=int(given("top_k", 0)),
        top_p=float(given("top_p", 1.0)),
        min_p=float(given("min_p", 0.0)),
        repetition_penalty=float(given("repetition_penalty", 1.0)),
        presence_penalty=float(given("presence_penalty", 0.0)),
        frequency_penalty=float(given("frequency_penalty", 0.0)),
        logit_bias=_bias(given("logit_bias", {}), served.vocab_size),
        top_logprobs=top_logprobs,
        guide=_guide(given("response_format", {}), served),
        seed=int(given("seed", secrets.randbits(63))),
    )


def _bias(told: Mapping[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    found = tuple((int(token), float(value)) for token, value in told.items())
    if wrong := next((token for token, _ in found if token >= vocab_size), None):
        raise BadRequest(f"logit_bias: token {wrong}, and the vocabulary ends at {vocab_size - 1}", param="logit_bias")
    return found


def _guide(told: Mapping[str, Any], served: Served) -> Any:
    kind = told.get("type", "text")
    if kind == "text":
        return None
    return served.guide(told["json_schema"]["schema"] if kind == "json_schema" else None)


class Generation:
    """The jobs of one request. Iterate `changes` to its end, or call `close`."""

    def __init__(self, served: Served, scheduler: Scheduler, metrics: Metrics, wanted: Wanted) -> None:
        decoder = served.decoder
        assert decoder
        self._scheduler, self._metrics, self.wanted = scheduler, metrics, wanted
        self._mail: deque[tuple[int, Sequence[Piece] | Exception, float]] = deque()
        self._arrived = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._signalled = False
        self._told_at = 0.0  # on the loop's clock
        # Nobody waits for the tokens of an answer that goes out whole; a stop text has to be seen when it comes.
        self._eager = wanted.streams or bool(wanted.stop)
        most = 1 << 20 if wanted.most is None else wanted.most
        asked = Sampling(max_new_tokens=max(1, most))
        limit = limits([len(ids) for ids in wanted.prompts], asked, decoder.context_length)
        eos = frozenset() if wanted.ignore_eos else frozenset(decoder.eos_token_ids)
        ends = eos | wanted.stop_tokens
        self.choices = [
            Choice(served.tokenizer, ids, wanted.stop, ends, wanted.logprobs)
            for ids in wanted.prompts
            for _ in range(wanted.choices)
        ]
        self._timers = [Timer(metrics) for _ in self.choices]
        self._jobs = [
            Job(ids, wanted.sampling, wanted.choices, count, ends, self._deliverer(number))
            for number, (ids, count) in enumerate(zip(wanted.prompts, limit, strict=True))
        ]
        if decoder.most_tokens and (largest := max(job.tokens for job in self._jobs)) > decoder.most_tokens:
            raise BadRequest(
                f"prompt and answer may take {largest} tokens, and the engine's cache holds {decoder.most_tokens}: "
                "ask for fewer max_tokens",
                param="max_tokens",
            )
        if most == 0:
            self._jobs = []
            for choice in self.choices:
                choice.finish = "length"

    def begin(self) -> None:
        """Queue it. Raises Busy or Draining."""
        self._scheduler.submit(self._jobs)

    async def changes(self) -> AsyncIterator[list[tuple[int, str]]]:
        """(place of a choice, text that became known), of several tokens when they come faster than `_GATHER_S`."""
        try:
            while any(choice.finish is None for choice in self.choices):
                await self._arrived.wait()
                self._arrived.clear()
                self._signalled = False
                if found := self._open():
                    self._told_at = self._loop.time()
                    yield found
        finally:
            self.close()

    def close(self) -> None:
        """End what still runs."""
        if any(choice.finish is None for choice in self.choices):
            self._scheduler.cancel(self._jobs)
            self._metrics.aborted.inc()

    @property
    def usage(self) -> dict[str, int]:
        prompt = sum(map(len, self.wanted.prompts))
        new = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def _open(self) -> list[tuple[int, str]]:
        """Take what has come, choice by choice."""
        pieces: dict[int, list[Piece]] = {}
        times: dict[int, list[float]] = {}
        while self._mail:
            number, mail, at = self._mail.popleft()
            if isinstance(mail, Exception):
                raise mail
            for piece in mail:
                place = number * self.wanted.choices + int(piece.key[1])  # type: ignore[index]
                if not self.choices[place].finish:  # else a stop text ended it; this token was under way
                    pieces.setdefault(place, []).append(piece)
                    times.setdefault(place, []).append(at)
        return [(place, self._take(place, mine, times[place])) for place, mine in pieces.items()]

    def _take(self, place: int, pieces: list[Piece], times: list[float]) -> str:
        choice = self.choices[place]
        before = choice.tokens
        text = choice.add(pieces)
        self._timers[place].tokens(times[: choice.tokens - before], choice.finish)
        if choice.finish and not pieces[-1].finished:
            number, key = divmod(place, self.wanted.choices)
            self._scheduler.drop(self._jobs[number], key)
        return text

    def _deliverer(self, number: int) -> Callable[[Sequence[Piece] | Exception], None]:
        def deliver(mail: Sequence[Piece] | Exception) -> None:
            self._mail.append((number, mail, time.perf_counter()))
            if isinstance(mail, Exception) or any(piece.finished for piece in mail):
                self._loop.call_soon_threadsafe(self._arrived.set)
            elif self._eager and not self._signalled:
                self._signalled = True
                self._loop.call_soon_threadsafe(self._gather)

        return deliver

    def _gather(self) -> None:
        """Tell of what came: at once, or when `_GATHER_S` have passed since the last time."""
        wait_s = self._told_at + _GATHER_S - self._loop.time()
        if wait_s > 0:
            self._loop.call_later(wait_s, self._arrived.set)
        else:
            self._arrived.set()


def scored(served: Served, ids: Sequence[int], top: int) -> list[tuple[float | None, list[tuple[int, float]]]]:
    """(log probability, likeliest tokens) of each token of a prompt; of the first nothing is known. For the engine's
    thread."""
    import numpy as np

    from pipeline.decoding.choose import likeliest, log_normalizer

    if len(ids) * served.vocab_size > _MOST_SCORED:
        raise BadRequest(f"a prompt of {len(ids)} tokens is too long to be scored", param="echo")
    logits_TV = served.engine.run({"input_ids": np.array([ids], np.int64)})["logits"][0]
    normalizer_T = log_normalizer(logits_TV)
    found: list[tuple[float | None, list[tuple[int, float]]]] = [(None, [])]
    for place, token in enumerate(ids[1:]):
        log_prob = float(logits_TV[place, token] - normalizer_T[place])
        found.append((log_prob, list(likeliest(logits_TV[place], float(normalizer_T[place]), top))))
    return found
