"""`/v1/completions` and `/v1/chat/completions`: what a body asks, and the form of what goes back."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.frozen import frozen
from pipeline.serve.answer import Choice, Told, token_text
from pipeline.serve.generation import Generation, Wanted, sampling_of, scored
from pipeline.serve.metrics import Metrics
from pipeline.serve.problems import BadRequest
from pipeline.serve.scheduler import Scheduler
from pipeline.serve.served import Served
from pipeline.text import chat_prompt

_DEFAULT_TOKENS = 16  # of a completion, as OpenAI's API has it


@frozen
class Server:
    """What every endpoint works with."""

    served: Served
    scheduler: Scheduler
    metrics: Metrics


def token_ids(served: Served, text: str, *, special: bool, param: str) -> list[int]:
    """A text's tokens. Raises BadRequest for one that has none."""
    try:
        ids: list[int] = served.tokenizer.encode(text, add_special_tokens=special).ids
    except Exception as error:  # half characters, which JSON can carry and UTF-8 cannot
        raise BadRequest(f"{param}: this text cannot be tokenized: {error}", param=param) from error
    return ids


def texts_or_ids(served: Served, given: Any, param: str) -> list[list[int]]:
    """A text, several, token ids, or several lists of them -> lists of token ids, none of them empty."""
    if isinstance(given, str):
        found = [token_ids(served, given, special=True, param=param)]
    elif isinstance(given[0], int):
        found = [list(given)]
    else:
        found = [
            token_ids(served, each, special=True, param=param) if isinstance(each, str) else list(each)
            for each in given
        ]
    if not all(found):
        raise BadRequest(f"{param}: a text without tokens", param=param)
    return found


def _stops(told: Any) -> list[str]:
    return [told] if isinstance(told, str) else list(told or ())


@dataclass
class Completion:
    """A request to go on with texts."""

    server: Server
    body: Mapping[str, Any]
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    kind = "text_completion"
    chunk_kind = "text_completion"

    def __post_init__(self) -> None:
        served = self.server.served
        self.generation = Generation(served, self.server.scheduler, self.server.metrics, self.wanted())
        self.server.metrics.prompt_tokens.inc(sum(map(len, self.generation.wanted.prompts)))
        self._heads = [self.head(choice) for choice in self.generation.choices]

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def tells_usage(self) -> bool:
        return bool((self.body.get("stream_options") or {}).get("include_usage"))

    def wanted(self) -> Wanted:
        body, served = self.body, self.server.served
        top = body.get("logprobs")
        most = body.get("max_tokens")
        prompts = texts_or_ids(served, body["prompt"], "prompt")
        return self._wanted(prompts, top or 0, top is not None, _DEFAULT_TOKENS if most is None else most)

    def _wanted(self, prompts: list[list[int]], top: int, logprobs: bool, most: int | None) -> Wanted:
        body = self.body
        return Wanted(
            prompts=prompts,
            sampling=sampling_of(body, self.server.served, top),
            choices=int(body.get("n") or 1),
            most=most,
            stop=_stops(body.get("stop")),
            stop_tokens=frozenset(body.get("stop_token_ids") or ()),
            ignore_eos=bool(body.get("ignore_eos")),
            logprobs=logprobs,
            streams=self.streams,
        )

    async def begin(self) -> None:
        """Queue it; with `echo` and `logprobs`, score the prompts first. Raises what a client is told."""
        if self.body.get("echo") and self.generation.wanted.logprobs:
            await self._score()
        self.generation.begin()

    async def _score(self) -> None:
        served, wanted = self.server.served, self.generation.wanted
        top = wanted.sampling.top_logprobs
        calls = [
            self.server.scheduler.call(lambda ids=ids: scored(served, ids, top))  # type: ignore[misc]
            for ids in wanted.prompts
        ]
        for number, call in enumerate(calls):
            found = await asyncio.wrap_future(call)
            told, offset = [], 0
            for token, (log_prob, likeliest) in zip(wanted.prompts[number], found, strict=True):
                text = token_text(served.tokenizer, token)
                names = [(token_text(served.tokenizer, other), value) for other, value in likeliest]
                told.append(Told(token, text, log_prob, names, offset))
                offset += len(served.tokenizer.decode([token], skip_special_tokens=True))
            for choice in self.generation.choices[number * wanted.choices : (number + 1) * wanted.choices]:
                choice.told = list(told)

    def head(self, choice: Choice) -> str:
        """What stands before the continuation."""
        if not self.body.get("echo"):
            return ""
        return str(self.server.served.tokenizer.decode(list(choice.prompt), skip_special_tokens=True))

    def whole(self) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        choices = [self.choice(place, choice) for place, choice in enumerate(self.generation.choices)]
        return {**self._frame(self.kind), "choices": choices, "usage": self.generation.usage}

    def choice(self, place: int, choice: Choice) -> dict[str, Any]:
        logprobs = self.logprobs(choice, choice.told, len(self._heads[place]))
        text = self._heads[place] + choice.text
        return {"index": place, "text": text, "finish_reason": choice.finish, "logprobs": logprobs}

    def first(self) -> list[dict[str, Any]]:
        """Chunks before anything is known."""
        return [self._chunk(place, head, [], None) for place, head in enumerate(self._heads) if head]

    def chunk(self, place: int, text: str) -> dict[str, Any]:
        """A chunk of text that became known."""
        choice = self.generation.choices[place]
        told, choice.told = choice.told, []
        return self._chunk(place, text, told, choice.finish)

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._frame(self.chunk_kind), "choices": [], "usage": self.generation.usage}

    def _chunk(self, place: int, text: str, told: Sequence[Told], finish: str | None) -> dict[str, Any]:
        choice = self.generation.choices[place]
        logprobs = self.logprobs(choice, told, len(self._heads[place]))
        found = {"index": place, "text": text, "finish_reason": finish, "logprobs": logprobs}
        return {**self._frame(self.chunk_kind), "choices": [found]}

    def logprobs(self, choice: Choice, told: Sequence[Told], shift: int) -> dict[str, Any] | None:
        if not choice.told_logprobs:
            return None
        scored_tokens = len(choice.prompt) if self.body.get("echo") and not self.streams else 0
        return {
            "tokens": [each.text for each in told],
            "token_logprobs": [each.logprob for each in told],
            "top_logprobs": [dict(each.top) if each.logprob is not None else None for each in told],
            "text_offset": [
                each.offset + (shift if number >= scored_tokens else 0) for number, each in enumerate(told)
            ],
        }

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.server.served.name}


@dataclass
class ChatCompletion(Completion):
    """A request to answer a conversation."""

    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def wanted(self) -> Wanted:
        body, served = self.body, self.server.served
        messages = [{**each, "content": _plain(each["content"])} for each in body["messages"]]
        text = chat_prompt(served.folder, messages)
        ids = token_ids(served, text, special=False, param="messages")
        if body.get("top_logprobs") is not None and not body.get("logprobs"):
            raise BadRequest("top_logprobs: needs logprobs: true", param="top_logprobs")
        most = body.get("max_completion_tokens")
        most = body.get("max_tokens") if most is None else most
        return self._wanted([ids], body.get("top_logprobs") or 0, bool(body.get("logprobs")), most)

    def head(self, choice: Choice) -> str:
        return ""

    def choice(self, place: int, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text}
        logprobs = self.logprobs(choice, choice.told, 0)
        return {"index": place, "message": message, "finish_reason": choice.finish, "logprobs": logprobs}

    def first(self) -> list[dict[str, Any]]:
        return [
            {**self._frame(self.chunk_kind), "choices": [self._delta(place, {"role": "assistant", "content": ""})]}
            for place in range(len(self.generation.choices))
        ]

    def _delta(self, place: int, delta: Mapping[str, Any]) -> dict[str, Any]:
        return {"index": place, "delta": delta, "finish_reason": None, "logprobs": None}

    def _chunk(self, place: int, text: str, told: Sequence[Told], finish: str | None) -> dict[str, Any]:
        choice = self.generation.choices[place]
        found = self._delta(place, {"content": text})
        found |= {"finish_reason": finish, "logprobs": self.logprobs(choice, told, 0)}
        return {**self._frame(self.chunk_kind), "choices": [found]}

    def logprobs(self, choice: Choice, told: Sequence[Told], shift: int) -> dict[str, Any] | None:
        if not choice.told_logprobs:
            return None

        def one(text: str, log_prob: float | None) -> dict[str, Any]:
            return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}

        content = [
            {**one(each.text, each.logprob), "top_logprobs": [one(*other) for other in each.top]} for each in told
        ]
        return {"content": content, "refusal": None}


def _plain(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
