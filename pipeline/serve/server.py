"""The process: an artifact is opened, proved by one real answer, served, and drained when it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import field
from typing import Any

from pipeline.engine import Sampling
from pipeline.errors import UnavailableError
from pipeline.frozen import frozen
from pipeline.serve.served import GENERATES, Served


@frozen
class Options:
    """How it is served."""

    host: str = "127.0.0.1"
    port: int = 8000
    most_rows: int = 16
    """Prompts, choices and beams that are decoded together."""
    most_waiting: int = 256
    """Requests in the queue; one more is told to come again."""
    body_bytes: int = 8 << 20
    answer_s: float = 600.0
    drain_s: float = 60.0
    """For what is under way when the process is told to end."""
    keys: tuple[str, ...] = field(default=(), repr=False)


def serve(served: Served, options: Options, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. `ready` is told the address after the first real answer.

    Raises UnavailableError when the address cannot be taken.
    """
    import uvicorn

    from pipeline.serve.app import Guards, State, application
    from pipeline.serve.completions import Server
    from pipeline.serve.metrics import Metrics
    from pipeline.serve.scheduler import Scheduler
    from pipeline.serve.schema import Api, Limits

    listener = listen(options.host, options.port)
    scheduler = Scheduler(served.decoder, most_rows=options.most_rows, most_waiting=options.most_waiting)
    state = State()
    most = (served.context_length or 1 << 20) - (served.task == GENERATES)  # a token of its own for the answer
    limits = Limits(served.name, served.task, served.vocab_size, most, scheduler.most_rows)
    api = Api(limits, guarded=bool(options.keys))
    guards = Guards(options.keys, body_bytes=options.body_bytes, answer_s=options.answer_s)
    app = application(Server(served, scheduler, Metrics(served.name)), api, guards, state)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="off",
        timeout_graceful_shutdown=int(options.drain_s), timeout_keep_alive=30, ws_max_size=options.body_bytes,
    )  # fmt: skip

    class Drained(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """uvicorn's own would raise the signal again once all is drained: then that is no clean end."""
            loop = asyncio.get_running_loop()
            for each in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(each, self.told, each)
            yield

        def told(self, number: int) -> None:
            state.draining = True
            self.handle_exit(number, None)

    server = Drained(config)

    async def run() -> None:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        warming = asyncio.create_task(_warm(served, scheduler))
        await asyncio.wait({serving, warming}, return_when=asyncio.FIRST_COMPLETED)
        if warming.done():
            if (error := warming.exception()) is not None:
                server.should_exit = True
                await serving
                raise error
            state.ready = True
            host, port = listener.getsockname()[:2]
            ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        await serving

    try:
        asyncio.run(run())
    finally:
        scheduler.stop()
        scheduler.join(5.0)


async def _warm(served: Served, scheduler: Any) -> None:
    """One real token, or one real pass."""
    from pipeline.serve.completions import token_ids
    from pipeline.serve.encode import encode_batch
    from pipeline.serve.scheduler import Job

    ids = token_ids(served, "Hello", special=True, param="") or [0]
    if served.task != GENERATES:
        await asyncio.wrap_future(scheduler.call(lambda: encode_batch(served, [ids])))
        return
    loop, answered = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def deliver(mail: Any) -> None:
        def tell() -> None:
            if not answered.done():
                (answered.set_exception if isinstance(mail, Exception) else answered.set_result)(mail)

        loop.call_soon_threadsafe(tell)

    scheduler.submit([Job(ids, Sampling(), 1, 1, frozenset(), deliver)])
    await answered


def listen(host: str, port: int) -> socket.socket:
    """Take an address. Raises UnavailableError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's algorithm off where the protocol is named: else the end of an answer waits 40 ms for the
    # client's acknowledgement of its beginning.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UnavailableError(
            f"{host}:{port} cannot be taken: {error.strerror or error}",
            hint="choose another --port; 0 takes a free one",
        ) from error
    listener.listen(1024)
    return listener
