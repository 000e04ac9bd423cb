"""A proxy before the registry that does harm on request: cuts, lies, storms, redirects, slowness; and that listens.

`proxy.faults` are tried in order; the first whose method and path match, and that has turns left, happens. `proxy.log`
is what was asked. It can also ask for credentials, and hand out tokens for them.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Kind = Literal["cut", "cut upload", "status", "redirect", "header", "body", "slow", "short"]
BLOCK = 1 << 16


@dataclass
class Fault:
    """What goes wrong with the requests whose method and path match."""

    kind: Kind
    method: str = "GET"
    path: str = "/blobs/"
    """A regular expression, searched for."""
    value: Any = 0
    """cut, cut upload, short: after so many bytes; status: (code, headers); redirect: where to; header: (name, value);
    body: the body; slow: bytes a second."""
    times: int = 1_000_000


@dataclass
class Request:
    """What was asked, and how many bytes of its body came."""

    method: str
    path: str
    headers: dict[str, str]
    received: int = 0


@dataclass
class Proxy:
    """The proxy; use as a context manager."""

    upstream: str
    auth: str = ""
    """`basic` or `bearer`: ask for the credentials below."""
    user: str = "wright"
    password: str = "right"
    tls: ssl.SSLContext | None = None
    faults: list[Fault] = field(default_factory=list)
    log: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        if self.tls:
            self.server.socket = self.tls.wrap_socket(self.server.socket, server_side=True)
        self.scheme = "https" if self.tls else "http"
        self.address = f"127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def asked(self, method: str, path: str = "") -> list[Request]:
        """The requests whose method and path match."""
        return [r for r in self.log if re.fullmatch(method, r.method) and re.search(path, r.path)]

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 20
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:
                self.close_connection = True

        def answer(self) -> None:
            asked = Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
            proxy.log.append(asked)
            if self.path.startswith("/token"):
                self.token()
                return
            if not self.known():
                self.challenge()
                return
            fault = proxy.fault(self.command, self.path)
            kind = fault.kind if fault else ""
            if fault and kind == "status":
                code, headers = fault.value
                self.plain(code, b'{"errors":[{"code":"TOLD","message":"to"}]}', headers)
            elif fault and kind == "redirect":
                self.plain(307, b"", {"Location": fault.value + self.path})
            elif fault and kind == "body":
                self.plain(200, fault.value, {"Content-Type": "application/vnd.oci.image.index.v1+json"})
            else:
                self.forward(asked, fault)

        def known(self) -> bool:
            told = self.headers.get("Authorization", "")
            if proxy.auth == "basic":
                return told == self.basic()
            return not proxy.auth or told == "Bearer the-token"

        def basic(self) -> str:
            return "Basic " + base64.b64encode(f"{proxy.user}:{proxy.password}".encode()).decode()

        def challenge(self) -> None:
            self.drain()
            realm = f'Bearer realm="http://{proxy.address}/token",service="test",scope="repository:x:pull,push"'
            asks = realm if proxy.auth == "bearer" else 'Basic realm="test"'
            self.plain(401, b"{}", {"WWW-Authenticate": asks})

        def token(self) -> None:
            good = self.headers.get("Authorization") == self.basic()
            self.plain(200 if good else 401, json.dumps({"token": "the-token"}).encode(), {})

        def drain(self) -> None:
            left = int(self.headers.get("Content-Length") or 0)
            while left > 0 and (block := self.rfile.read(min(BLOCK, left))):
                left -= len(block)

        def plain(self, code: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            if int(self.headers.get("Content-Length") or 0):
                self.close_connection = True
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def forward(self, asked: Request, fault: Fault | None) -> None:
            line = http.client.HTTPConnection(proxy.upstream, timeout=20)
            line.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("authorization", "connection"):
                    line.putheader(name, value)
            line.endheaders()
            left = int(self.headers.get("Content-Length") or 0)
            cut = fault.value if fault and fault.kind == "cut upload" else None
            pace = fault.value if fault and fault.kind == "slow" else 0
            while left > 0 and (block := self.rfile.read(min(BLOCK, left))):
                if cut is not None and asked.received + len(block) > cut:
                    line.close()
                    self.hang_up()
                    return
                line.send(block)
                asked.received += len(block)
                left -= len(block)
                if pace:
                    time.sleep(len(block) / pace)
            answer = line.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if fault and fault.kind == "header" and name.lower() == fault.value[0].lower():
                    value = fault.value[1]
                if name.lower() == "location":
                    # The registry names itself as it was called: by the name of this proxy, without its TLS.
                    value = value.replace(f"http://{proxy.address}", f"{proxy.scheme}://{proxy.address}")
                if fault and fault.kind == "short" and name.lower() == "content-length":
                    value = str(min(int(value), fault.value))
                if name.lower() not in ("connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.end_headers()
            self.body(answer, fault, pace)
            line.close()

        def body(self, answer: http.client.HTTPResponse, fault: Fault | None, pace: float) -> None:
            limit = fault.value if fault and fault.kind in ("cut", "short") else None
            sent = 0
            while block := answer.read(BLOCK):
                if limit is not None and sent + len(block) >= limit:
                    self.wfile.write(block[: limit - sent])
                    if fault and fault.kind == "cut":
                        self.hang_up()
                    return
                self.wfile.write(block)
                sent += len(block)
                if pace:
                    time.sleep(len(block) / pace)

        def hang_up(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    for method in ("GET", "HEAD", "PUT", "POST", "PATCH", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.answer)
    return Handler
