"""The ASGI application: paths, what stands before them (keys, sizes, times), and streams."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from pipeline.errors import EnginewrightError, RecipeError
from pipeline.frozen import frozen
from pipeline.serve import encode, problems
from pipeline.serve.completions import ChatCompletion, Completion, Server
from pipeline.serve.schema import Api

_OPEN = ("/health", "/ready")
"""Answered without a key."""


@frozen
class Guards:
    """What a request may be."""

    keys: tuple[str, ...] = ()
    """Any of these is asked for as a bearer token; none: everybody may ask."""
    body_bytes: int = 8 << 20
    body_s: float = 30.0
    """For the body to come in."""
    answer_s: float = 600.0
    """For the answer to go out."""


class State:
    """Whether requests are taken."""

    def __init__(self) -> None:
        self.ready = False
        self.draining = False


def application(server: Server, api: Api, guards: Guards, state: State) -> Starlette:
    """The application over an open artifact."""
    app = _Endpoints(server, api, guards, state)
    routes = [
        Route("/health", app.health),
        Route("/ready", app.ready),
        Route("/metrics", app.metrics),
        Route("/openapi.json", app.openapi),
        Route("/v1/models", app.models),
        Route("/v1/models/{model:path}", app.model),
        Route("/tokenize", app.tokenize, methods=["POST"]),
        Route("/detokenize", app.detokenize, methods=["POST"]),
    ]
    posts: dict[str, Any] = {
        "/v1/completions": app.completions,
        "/v1/chat/completions": app.chat,
        "/v1/embeddings": app.embeddings,
        "/v1/classify": app.classify,
    }
    routes += [Route(path, each, methods=["POST"]) for path, each in posts.items() if path in api.document["paths"]]
    sockets = [WebSocketRoute("/v1/stream", app.stream)] if server.served.decoder else []
    handlers = {
        problems.Problem: app.problem,
        EnginewrightError: app.failed,
        HTTPException: app.refused,
        ClientDisconnect: app.gone,
        Exception: app.broken,
    }
    return Starlette(routes=[*routes, *sockets], exception_handlers=handlers)  # type: ignore[arg-type]


class _Endpoints:
    def __init__(self, server: Server, api: Api, guards: Guards, state: State) -> None:
        self._server, self._api, self._guards, self._state = server, api, guards, state

    # what is told of the server

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        if self._state.draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ready"}) if self._state.ready else JSONResponse({"status": "starting"}, 503)

    async def metrics(self, request: Request) -> Response:
        self._permit(request.headers)
        metrics = self._server.metrics
        metrics.running.set(self._server.scheduler.running)
        metrics.waiting.set(self._server.scheduler.waiting)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        self._permit(request.headers)
        return JSONResponse(self._api.document)

    async def models(self, request: Request) -> Response:
        self._permit(request.headers)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._permit(request.headers)
        if request.path_params["model"] != self._server.served.name:
            raise problems.NotFound(f"no model is called {request.path_params['model']!r}", param="model")
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        served = self._server.served
        return {
            "id": served.name, "object": "model", "created": 0, "owned_by": "enginewright",
            "max_model_len": served.context_length, "task": served.task, "runtime": served.runtime,
            "artifact_id": served.artifact_id,
        }  # fmt: skip

    # text

    async def completions(self, request: Request) -> Response:
        body = self._api.check("CompletionRequest", await self._body(request))
        return await self._answer(request, Completion(self._server, body))

    async def chat(self, request: Request) -> Response:
        body = self._api.check("ChatRequest", await self._body(request))
        return await self._answer(request, ChatCompletion(self._server, body))

    async def _answer(self, request: Request, asked: Completion) -> Response:
        self._take()
        if asked.streams:
            await asked.begin()
            return StreamingResponse(self._events(asked), media_type="text/event-stream", headers=_NO_BUFFER)

        async def run() -> dict[str, Any]:
            await asked.begin()
            async for _ in asked.generation.changes():
                pass
            return asked.whole()

        return JSONResponse(await self._in_time(request, run()))

    async def _events(self, asked: Completion) -> AsyncIterator[str]:
        """Server-sent events. Leaving this generator, whoever ends it, ends the work."""
        try:
            async with asyncio.timeout(self._guards.answer_s):
                async for chunk in chunks(asked):
                    yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        except (problems.Problem, EnginewrightError, TimeoutError) as error:
            yield f"data: {json.dumps(_problem(error).body())}\n\n"
        finally:
            asked.generation.close()
        yield "data: [DONE]\n\n"

    async def stream(self, socket: WebSocket) -> None:
        """A request a message, its chunks a message each, the last one with `usage`. Closing ends the work."""
        try:
            self._permit(socket.headers)
        except problems.Unauthorized:
            await socket.close(1008, "no valid key")
            return
        await socket.accept()
        reading: asyncio.Task[Any] | None = None
        try:
            while True:
                reading = reading or asyncio.create_task(socket.receive_text())
                text = await reading
                reading = asyncio.create_task(socket.receive_text())
                writing = asyncio.create_task(self._say(socket, text))
                done, _ = await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
                if reading in done and writing not in done and reading.exception():
                    writing.cancel()  # the client has gone
                with contextlib.suppress(asyncio.CancelledError):
                    await writing
        except (WebSocketDisconnect, RuntimeError, KeyError):
            pass
        finally:
            if reading:
                reading.cancel()

    async def _say(self, socket: WebSocket, text: str) -> None:
        try:
            self._take()
            body = self._json(text.encode())
            chat = isinstance(body, dict) and "messages" in body
            checked = self._api.check("ChatRequest" if chat else "CompletionRequest", body)
            asked = (ChatCompletion if chat else Completion)(self._server, {**checked, "stream": True})
            try:
                await asked.begin()
                async with asyncio.timeout(self._guards.answer_s):
                    async for chunk in chunks(asked, usage=True):
                        await socket.send_json(chunk)
            finally:
                asked.generation.close()
        except (problems.Problem, EnginewrightError, TimeoutError) as error:
            await socket.send_json(_problem(error).body())

    # vectors and tokens

    async def embeddings(self, request: Request) -> Response:
        body = self._api.check("EmbeddingRequest", await self._body(request))
        self._take()
        return JSONResponse(await self._in_time(request, encode.embeddings(self._server, body)))

    async def classify(self, request: Request) -> Response:
        body = self._api.check("ClassifyRequest", await self._body(request))
        self._take()
        return JSONResponse(await self._in_time(request, encode.classify(self._server, body)))

    async def tokenize(self, request: Request) -> Response:
        body = self._api.check("TokenizeRequest", await self._body(request))
        served = self._server.served
        special = body.get("add_special_tokens", True)
        ids = served.tokenizer.encode(body["prompt"], add_special_tokens=special).ids
        return JSONResponse({"count": len(ids), "max_model_len": served.context_length, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        body = self._api.check("DetokenizeRequest", await self._body(request))
        return JSONResponse({"prompt": self._server.served.tokenizer.decode(body["tokens"], skip_special_tokens=False)})

    # what stands before all of them

    def _permit(self, headers: Mapping[str, str]) -> None:
        kind, _, key = headers.get("authorization", "").partition(" ")
        sent = key.encode() if kind.lower() == "bearer" else b""
        # Every key is compared, in a time that does not tell how much of it is right.
        if self._guards.keys and not any([hmac.compare_digest(sent, each.encode()) for each in self._guards.keys]):  # noqa: C419
            raise problems.Unauthorized("a valid key is asked for: Authorization: Bearer <key>")

    def _take(self) -> None:
        if self._state.draining:
            raise problems.Draining("the server is shutting down")

    async def _body(self, request: Request) -> Any:
        self._permit(request.headers)
        most = self._guards.body_bytes
        data = bytearray()
        try:
            async with asyncio.timeout(self._guards.body_s):
                async for part in request.stream():
                    data += part
                    if len(data) > most:
                        raise problems.TooLarge(f"the body is larger than {most} bytes")
        except TimeoutError:
            raise problems.TooLate(f"the body did not come within {self._guards.body_s:g} s") from None
        return self._json(bytes(data))

    def _json(self, data: bytes) -> Any:
        try:
            found = json.loads(data, parse_constant=_no_constant, parse_float=_number)
            json.dumps(found, ensure_ascii=False).encode()  # half characters are JSON and no text
        except (ValueError, RecursionError) as error:
            raise problems.BadRequest(f"the body is not JSON: {error}") from None
        return found

    async def _in_time(self, request: Request, work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
        """The work's result, unless the client leaves or the time is over: then it ends."""
        doing = asyncio.ensure_future(work)
        watching = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({doing, watching}, timeout=self._guards.answer_s, return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                return doing.result()
            if watching.done():
                raise ClientDisconnect
            raise problems.TimedOut(f"the answer takes longer than {self._guards.answer_s:g} s")
        finally:
            for task in (doing, watching):
                task.cancel()
            await asyncio.gather(doing, watching, return_exceptions=True)

    async def problem(self, request: Request, error: problems.Problem) -> Response:
        headers = {"Retry-After": "1"} if isinstance(error, problems.Busy | problems.Draining) else {}
        if isinstance(error, problems.Unauthorized):
            headers = {"WWW-Authenticate": "Bearer"}
        return JSONResponse(error.body(), error.status, headers)

    async def failed(self, request: Request, error: EnginewrightError) -> Response:
        return await self.problem(request, _problem(error))

    async def broken(self, request: Request, error: Exception) -> Response:
        return await self.problem(request, problems.Problem("internal error: the server's log has it"))

    async def refused(self, request: Request, error: HTTPException) -> Response:
        found = problems.Problem(str(error.detail))
        found.kind = "invalid_request_error"
        return JSONResponse(found.body(), error.status_code, error.headers)

    async def gone(self, request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it


_NO_BUFFER = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def chunks(asked: Completion, *, usage: bool = False) -> AsyncIterator[dict[str, Any]]:
    """A request's chunks in the order in which they become known, `usage` last where it is asked for."""
    for first in asked.first():
        yield first
    for place, choice in enumerate(asked.generation.choices):
        if choice.finish:  # nothing was to be generated
            yield asked.chunk(place, "")
    async for changed in asked.generation.changes():
        for place, text in changed:
            choice = asked.generation.choices[place]
            if text or choice.finish or choice.told:
                yield asked.chunk(place, text)
    if usage or asked.tells_usage:
        yield asked.usage_chunk()


async def _left(request: Request) -> None:
    while True:
        if (await request.receive())["type"] == "http.disconnect":
            return


def _problem(error: Exception) -> problems.Problem:
    if isinstance(error, problems.Problem):
        return error
    if isinstance(error, RecipeError):
        return problems.BadRequest(error.message)
    if isinstance(error, TimeoutError):
        return problems.TimedOut("the answer takes too long")
    return problems.Problem(error.message if isinstance(error, EnginewrightError) else "internal error")


def _number(text: str) -> float | int:
    """JSON knows one kind of number: 16.0 is an integer."""
    found = float(text)
    if found in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is out of range")
    return int(found) if found.is_integer() else found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
