"""A real registry on loopback (Debian's docker-registry), started and stopped by the tests, and its storage."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


def program(name: str) -> str:
    """Where a Debian package's program is. Without it a test is skipped, and fails where CI must have it."""
    found = shutil.which(name)
    if found is None:
        reason = f"{name} is not installed (ci/debian-packages installs it)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@dataclass
class Registry:
    """A registry that runs."""

    address: str
    root: Path

    def blob(self, digest: str) -> Path:
        """Where its storage holds a blob."""
        value = digest.removeprefix("sha256:")
        return self.root / "storage/docker/registry/v2/blobs/sha256" / value[:2] / value / "data"

    def ask(
        self, method: str, path: str, data: bytes | None = None, kind: str = ""
    ) -> tuple[int, dict[str, str], bytes]:
        """One request, past our own client: status, headers, body."""
        headers = {"Accept": "*/*", **({"Content-Type": kind} if kind else {})}
        if method == "GET" and "/manifests/" in path:
            headers["Accept"] = ", ".join(f"application/vnd.oci.image.{what}.v1+json" for what in ("index", "manifest"))
        request = urllib.request.Request(f"http://{self.address}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def manifest(self, repository: str, reference: str) -> Any:
        """A manifest as JSON."""
        status, _, data = self.ask("GET", f"/v2/{repository}/manifests/{reference}")
        assert status == 200, data
        return json.loads(data)

    def tags(self, repository: str) -> list[str]:
        """Every tag; none where there is no repository."""
        status, _, data = self.ask("GET", f"/v2/{repository}/tags/list")
        return sorted(json.loads(data)["tags"] or []) if status == 200 else []

    def collect(self) -> str:
        """`garbage-collect -m`: what it says."""
        config = str(self.root / "config.yml")
        done = subprocess.run(
            [program("docker-registry"), "garbage-collect", "-m", config], capture_output=True, text=True, check=True
        )
        return done.stdout


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def running(root: Path) -> Iterator[Registry]:
    """A registry with its storage under `root`."""
    served = program("docker-registry")
    root.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{closed_port()}"
    config = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(root / "storage")}, "delete": {"enabled": True}},
        "http": {"addr": address, "secret": "of the tests"},
    }
    (root / "config.yml").write_text(json.dumps(config))
    with (root / "registry.log").open("ab") as log:
        server = subprocess.Popen([served, "serve", str(root / "config.yml")], stdout=log, stderr=log)
    try:
        for _ in range(400):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/v2/"):
                break
            assert server.poll() is None, (root / "registry.log").read_text()
            time.sleep(0.025)
        yield Registry(address, root)
    finally:
        server.terminate()
        server.wait()
