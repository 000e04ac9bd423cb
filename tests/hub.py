"""A stand-in for the Hugging Face hub on loopback: the parts of its HTTP API that huggingface_hub calls, with faults.

`hub.commit(repo, files)` makes a commit, `hub.faults` switches faults on by path, `hub.requests` is what was asked.
Small text files are plain git blobs; the rest is LFS and is served, as by the real hub, by a redirect to a second host,
which must never see the token.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".bin", ".model")


@dataclass
class Fault:
    """What goes wrong with a path, `times` times."""

    kind: str
    """drop: the connection breaks after `value` bytes; bytes: one byte is wrong; status: answers `value`; slow: waits
    `value` seconds; short: ends early, politely; html: a login page."""
    value: float = 0
    times: int = 1_000_000


@dataclass
class Request:
    """What was asked."""

    method: str
    path: str
    host: str
    headers: dict[str, str]


@dataclass
class Repo:
    """A repository: its commits, and the names that point to them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


class Hub:
    """The server. Use as a context manager; `endpoint` is its address."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, Fault] = {}
        """Last part of a path, or `api` -> what goes wrong."""
        self.requests: list[Request] = []
        self.token = "hf_right"
        self.ranges = True
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.port = self.server.server_port
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Hub:
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str, files: dict[str, bytes], *refs: str) -> str:
        """Make a commit and point `main` and `refs` at it; its 40 hex digits."""
        described = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())})
        sha = hashlib.sha1(described.encode()).hexdigest()
        held = self.repos.setdefault(repo, Repo())
        held.commits[sha] = dict(files)
        held.refs.update(dict.fromkeys(("main", *refs), sha))
        return sha

    def asked(self, part: str, method: str = "GET") -> list[Request]:
        """The requests whose path ends with `part`."""
        return [r for r in self.requests if r.method == method and urlsplit(r.path).path.endswith(part)]

    def fault_of(self, name: str) -> Fault | None:
        fault = self.faults.get(name)
        if fault is None or fault.times <= 0:
            return None
        fault.times -= 1
        return fault


def git_blob(data: bytes) -> str:
    """The sha1 by which git knows a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _info(repo: str, sha: str, files: dict[str, bytes], gated: bool) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = []
    for name, data in files.items():
        entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_blob(data)}
        if name.endswith(LFS):
            entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        siblings.append(entry)
    named = {"_id": "1", "id": repo, "modelId": repo, "sha": sha, "private": False, "gated": gated and "manual"}
    return {**named, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}


def _tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    tree: list[dict[str, Any]] = []
    for name, data in files.items():
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_blob(data)}
        if name.endswith(LFS):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        tree.append(entry)
    return tree


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 10

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            hub.requests.append(Request(self.command, self.path, headers.get("host", ""), headers))
            path = unquote(urlsplit(self.path).path)
            if path.startswith("/cdn/"):
                return self.cdn(path)
            if path.startswith("/api/models/"):
                return self.api(path.removeprefix("/api/models/"))
            repo, found, rest = path[1:].partition("/resolve/")
            if not found:
                return self.refuse(404, "", "Sorry, we can't find the page you are looking for.")
            return self.resolve(repo, *rest.split("/", 1))

        def api(self, rest: str) -> None:
            listed = "/tree/" in rest
            repo, _, revision = rest.partition("/tree/" if listed else "/revision/")
            if self.faulty("api"):
                return None
            held = self.opened(repo, files=False)
            if held is None:
                return None
            sha = self.sha(held, revision or "main")
            if sha is None:
                return None
            if listed:
                return self.send(
                    200, json.dumps(_tree(held.commits[sha])).encode(), {"Content-Type": "application/json"}
                )
            body = _info(repo, sha, held.commits[sha], held.gated)
            if not parse_qs(urlsplit(self.path).query).get("blobs"):
                body["siblings"] = [{"rfilename": s["rfilename"]} for s in body["siblings"]]
            return self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

        def resolve(self, repo: str, revision: str, name: str) -> None:
            held = self.opened(repo, files=True)
            if held is None:
                return None
            sha = self.sha(held, revision)
            if sha is None:
                return None
            if name not in held.commits[sha]:
                return self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
            data = held.commits[sha][name]
            headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
            if not name.endswith(LFS):
                return self.file(name, data, {**headers, "ETag": f'"{git_blob(data)}"'})
            digest = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{digest}"'}
            # Another host name is another origin: a client must leave its token behind.
            place = f"http://localhost:{hub.port}/cdn/{digest}/{name}"
            return self.send(302, b"", {**headers, "Location": place})

        def cdn(self, path: str) -> None:
            digest, _, name = path.removeprefix("/cdn/").partition("/")
            for repo in hub.repos.values():
                for files in repo.commits.values():
                    if hashlib.sha256(files.get(name, b"")).hexdigest() == digest:
                        return self.file(name, files[name], {"ETag": f'"{digest}"'})
            return self.refuse(404, "", "no such object")

        def opened(self, repo: str, *, files: bool) -> Repo | None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            held = hub.repos.get(repo)
            if token and token != hub.token:
                self.refuse(401, "", "Invalid credentials in Authorization header")
            elif held is None or (held.private and not token):
                self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            elif held.gated and files and not token:
                self.refuse(401, "GatedRepo", f"Access to model {repo} is restricted. Please log in.")
            elif held.gated and files and token == hub.token and not getattr(hub, "accepted", False):
                self.refuse(403, "GatedRepo", f"Access to model {repo} is restricted and you are not on the list.")
            else:
                return held
            return None

        def sha(self, held: Repo, revision: str) -> str | None:
            sha = held.refs.get(revision, revision)
            if sha in held.commits:
                return sha
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None

        def faulty(self, name: str) -> bool:
            """Whether a fault of `name` has answered already."""
            fault = hub.fault_of(name)
            if fault is None:
                return False
            if fault.kind == "status":
                self.refuse(int(fault.value), "", "the stand-in was told to", {"Retry-After": "0"})
            elif fault.kind == "html":
                self.send(200, b"<html>log in</html>", {"Content-Type": "text/html"})
            elif fault.kind == "slow":
                time.sleep(fault.value)
                self.close_connection = True
            elif fault.kind == "drop":
                self.close_connection = True
            return True

        def file(self, name: str, data: bytes, headers: dict[str, str]) -> None:
            """A file, from where the client wants it."""
            if self.command == "HEAD":
                return self.send(200, data, headers)
            fault = hub.fault_of(name)
            start, status = 0, 200
            wanted = self.headers.get("Range", "")
            if wanted and hub.ranges:
                start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
                if start >= len(data):
                    return self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                headers = {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            kind = fault.kind if fault else ""
            value = int(fault.value) if fault else 0
            if kind == "status":
                return self.refuse(value, "", "the stand-in was told to", {"Retry-After": "0"})
            if kind == "bytes":
                data = data[:value] + bytes([data[value] ^ 1]) + data[value + 1 :]
            if kind == "short":
                return self.send(status, data[start:-value], headers)
            if kind == "slow":
                time.sleep(fault.value if fault else 0)
            if kind == "drop":
                self.send(status, data[start : start + value], headers, announced=len(data) - start)
                self.close_connection = True
                return None
            return self.send(status, data[start:], headers)

        def refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
            more = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
            self.send(status, json.dumps({"error": message}).encode(), {**more, **(headers or {})})

        def send(self, status: int, body: bytes, headers: dict[str, str], announced: int | None = None) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) if announced is None else announced))
            self.end_headers()
            if self.command == "GET":
                for start in range(0, len(body), 1 << 16):
                    self.wfile.write(body[start : start + (1 << 16)])

    return Handler


def serving() -> Iterator[Hub]:
    """For a fixture: a hub that is shut down at the end."""
    with Hub() as hub:
        yield hub
