"""Push and pull one large file through a registry on loopback: enginewright, curl, oras-py, one after the other.

    python bench/transfer.py                 300 MB and 2 GiB, three rounds each
    python bench/transfer.py --only 300MB --rounds 1

Needs docker-registry and curl (Debian packages); oras-py gets an environment of its own in .bench/oras. Each round has
a repository of its own for each tool, so that nothing is there already. enginewright's pull verifies every byte and
puts it on disk (fsync) before the artifact appears; curl and oras-py do neither.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import environments
import machine
import measure
from measure import Cost

SIZES = {"300 MB": 300_000_000, "2 GiB": 2 << 30}
OURS, CURL, ORAS = "enginewright", "curl", "oras-py"
BLOCK = 1 << 22


@contextlib.contextmanager
def registry(place: Path) -> Iterator[str]:
    """A docker-registry on loopback; its address."""
    program = shutil.which("docker-registry")
    if program is None:
        raise SystemExit("docker-registry is not here: apt-get install docker-registry")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(place / "storage")}, "delete": {"enabled": True}},
        "http": {"addr": address, "secret": "bench"},
    }
    (place / "config.yml").write_text(json.dumps(config))
    with (place / "registry.log").open("wb") as log:
        server = subprocess.Popen([program, "serve", str(place / "config.yml")], stdout=log, stderr=log)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/v2/"):
                break
            time.sleep(0.05)
        yield address
    finally:
        server.terminate()
        server.wait()


def payload(path: Path, size: int) -> str:
    """A file of random bytes; its digest."""
    digest = hashlib.sha256()
    path.parent.mkdir(parents=True)
    with path.open("wb") as stream:
        while size:
            block = os.urandom(min(BLOCK, size))
            digest.update(block)
            stream.write(block)
            size -= len(block)
    return f"sha256:{digest.hexdigest()}"


def artifact(engine: Path, place: Path) -> Path:
    """An artifact around the file: what enginewright pushes."""
    from pipeline.artifact.manifest import Interface, ManifestFacts, Runtime, Target
    from pipeline.artifact.package import assemble

    facts = ManifestFacts(
        name="bench",
        version="1.0.0",
        build_key="sha256:" + "0" * 64,
        recipe={},
        target=Target(name="cpu"),
        runtime=Runtime(engine="copy", layout="hf"),
        interface=Interface(task="feature-extraction", kind="encoder"),
        precision="fp32",
    )
    return assemble(engine, golden_dir=None, manifest_facts=facts, destination=place, attestations={}).path


class Bench:
    """One size: three tools, push and pull."""

    def __init__(self, address: str, place: Path, size: int) -> None:
        self.address, self.place, self.size = address, place, size
        self.digest = payload(place / "engine" / "model.safetensors", size)
        self.artifact = artifact(place / "engine", place / "artifact")
        self.file = self.artifact / "model.safetensors"
        self.oras = environments.make("oras")
        self.log = place / "log"
        self.environment = {**os.environ, "ENGINEWRIGHT_CACHE": str(place / "cache")}

    def commands(self, tool: str, repository: str, out: Path) -> tuple[list[str], list[str]]:
        """The words of push and of pull."""
        base = f"http://{self.address}/v2/{repository}/blobs"
        reference = f"{self.address}/{repository}:1"
        ours, script = (
            str(Path(sys.executable).with_name("enginewright")),
            str(Path(__file__).parent / "transfer_oras.py"),
        )
        if tool == OURS:
            pull = [ours, "pull", reference, "--target", "cpu", "--out", str(out), "-q"]
            return [ours, "push", str(self.artifact), reference, "-q"], pull
        if tool == CURL:
            session = f"curl -sfi -X POST {base}/uploads/ | tr -d '\\r' | sed -n 's/^[Ll]ocation: //p'"
            header = "-H 'Content-Type: application/octet-stream'"
            push = f'place=$({session}) && curl -sf {header} -T {self.file} "$place&digest={self.digest}"'
            return ["sh", "-c", push], ["curl", "-sf", "-o", str(out / "model.safetensors"), f"{base}/{self.digest}"]
        oras = [str(self.oras), script]
        return [*oras, "push", reference, str(self.file)], [*oras, "pull", reference, str(out)]

    def round(self, number: int, found: dict[str, dict[str, list[Cost]]], check: Callable[[Path, str], None]) -> None:
        """Each tool once; the order changes from round to round."""
        tools = [OURS, CURL, ORAS]
        for tool in tools[number % 3 :] + tools[: number % 3]:
            out = self.place / f"out-{tool}"
            out.mkdir()
            for verb, words in zip(
                ("push", "pull"), self.commands(tool, f"{tool}/{number}-{self.size}", out), strict=True
            ):
                os.sync()
                cost = measure.run(words, cwd=self.place, environment=self.environment, log=self.log)
                if cost.exit_code:
                    raise SystemExit(f"{tool} {verb} failed:\n{self.log.read_text()[-2000:]}")
                found.setdefault(tool, {}).setdefault(verb, []).append(cost)
                print(f"{tool:13} {verb} {self.size / 1e6 / cost.wall_s:7.1f} MB/s {cost.cpu_s:6.2f} CPU s "
                      f"{cost.peak_bytes / 2**20:7.1f} MiB", flush=True)  # fmt: skip
            check(out, self.digest)
            shutil.rmtree(out)


def arrived(out: Path, digest: str) -> None:
    """The file is there and is the one that was sent."""
    (file,) = out.rglob("model.safetensors")
    with file.open("rb") as stream:
        assert f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}" == digest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[name.replace(" ", "") for name in SIZES])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    file = environments.HOME / "transfer.json"
    figures: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {"sizes": {}}
    figures["machine"] = machine.describe()
    for name, size in SIZES.items():
        if arguments.only and arguments.only != name.replace(" ", ""):
            continue
        load = [machine.load()]
        with tempfile.TemporaryDirectory(dir=environments.HOME) as scratch, registry(Path(scratch)) as address:
            bench = Bench(address, Path(scratch), size)
            found: dict[str, dict[str, list[Cost]]] = {}
            for number in range(arguments.rounds):
                bench.round(number, found, arrived)
                load.append(machine.load())
        tools = {tool: {verb: measure.median(costs) for verb, costs in verbs.items()} for tool, verbs in found.items()}
        today = datetime.now(UTC).date().isoformat()
        figures["sizes"][name] = {"bytes": size, "date": today, "load": load, "tools": tools}
        file.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
