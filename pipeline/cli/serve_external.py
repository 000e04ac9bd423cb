"""The part of `enginewright serve` that hands an artifact to another project's server, or writes how to."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.errors import RecipeError, StageError, UnavailableError
from pipeline.frozen import frozen
from pipeline.tables import DATA

if TYPE_CHECKING:
    from pipeline.serve.external import Server

F = TypeVar("F", bound=Callable[..., Any])
PROBE = DATA / "llm_probe.py"
_VLLM = ("-m", "vllm.entrypoints.openai.api_server", "--model")
"""What `vllm serve` runs. The wheels for CPUs have another name, and their `vllm` looks for its own in vain."""


FIRST_TOKEN_S = 900
END_S = 30
FEW_CORES = 4


@frozen
class Asked:
    """What was said on the command line."""

    write: str
    """`command`, `compose`, `kubernetes`; empty: start it."""
    framework: str
    image: str
    claim: str
    host: str
    port: int
    name: str
    keys: tuple[str, ...]
    """Of which a client needs one."""
    key_file: bool
    """Whether they were asked for on the command line."""
    own: Mapping[str, str]
    """Options of our own server that were given."""


def options(function: F) -> F:
    """The options of this part."""
    for option in (
        click.option("--claim", default="artifact", show_default=True, help="--kubernetes: the claim of the artifact."),
        click.option("--image", default="", help="The container to use instead of the project's own."),
        click.option("--framework", default="", help="Whose server: ovms, llama-server, ollama. Default: its own."),
        click.option("--kubernetes", "write", flag_value="kubernetes", help="Print a Deployment and a Service."),
        click.option("--compose", "write", flag_value="compose", help="Print a compose file."),
        click.option("--print", "write", flag_value="command", default="", help="Print the command."),
    ):
        function = option(function)
    return function


def concerns(manifest: dict[str, Any], asked: Asked) -> bool:
    """Whether it is this part's business: something is to be written, or the server is not ours."""
    from pipeline.serve.external import framework_of

    return bool(asked.write or asked.framework not in ("", "enginewright")) or framework_of(manifest) != "enginewright"


def handle(artifact: Path, manifest: dict[str, Any], asked: Asked) -> int:
    """Write it, or start the server and wait for its first real token; its exit code when it ends."""
    import yaml

    from pipeline.serve import manifests
    from pipeline.serve.external import server

    needs_image = asked.write in ("compose", "kubernetes")
    found = server(manifest, asked.framework, asked.image or ("" if needs_image else "none"), asked.name)
    own = _own(found, asked)
    found = replace(found, arguments=(*found.arguments, *own))
    if asked.write == "compose":
        click.echo(yaml.safe_dump(manifests.compose(found, artifact), sort_keys=False), nl=False)
        return 0
    if asked.write == "kubernetes":
        click.echo(yaml.safe_dump_all(manifests.kubernetes(found, asked.claim), sort_keys=False), nl=False)
        return 0
    command = [word.replace("{artifact}", str(artifact.resolve())) for word in found.command]
    if not command and found.framework == "enginewright":
        command = ["enginewright", "serve", str(artifact), "--host", asked.host, "--port", str(asked.port)]
        command += [*(("--name", asked.name) if asked.name else ()), *own]
    if not command:
        raise UnavailableError(
            f"{found.framework} is started in a container", hint="say --compose or --kubernetes, and start that"
        )
    command = _bound(command, asked)
    if asked.write:
        import shlex

        click.echo(shlex.join(command))
        return 0
    if asked.port == 0:
        raise RecipeError(
            f"--port 0: {found.framework}'s server would choose a port, and say it to nobody", hint="name a free port"
        )
    host = f"[{asked.host}]" if ":" in asked.host else asked.host
    return _start(command, found, f"http://{host}:{asked.port}", _key(found, asked.keys))


def _own(server: Server, asked: Asked) -> list[str]:
    """The options of our own server, as words; RecipeError where they mean nothing to another, or to a container."""
    if server.framework != "enginewright" and asked.own:
        raise RecipeError(
            f"{next(iter(asked.own))}: {server.framework}'s server does not take it",
            hint="what it is told stands in the recipe, below `serve`",
        )
    if asked.write and asked.key_file:
        variable = f"${server.key}" if server.key else "no key"
        raise RecipeError(
            "--api-key-file: what is written holds no secrets", hint=f"{server.framework} reads {variable}"
        )
    return [word for pair in asked.own.items() for word in pair]


def _key(server: Server, keys: Sequence[str]) -> dict[str, str]:
    """The environment that makes the server ask for a key. RecipeError where it cannot: it would serve anybody."""
    if not keys:
        return {}
    if not server.key:
        raise RecipeError(f"{server.framework}'s server asks for no keys", hint="put a proxy that does before it")
    if len(keys) > 1:
        raise RecipeError(f"{server.framework}'s server takes one key, not {len(keys)}", hint="give one")
    return {server.key: keys[0]}


def _bound(command: list[str], asked: Asked) -> list[str]:
    """The command on the address that was asked for."""
    values = {"--host": asked.host, "--server-name": asked.host, "--port": asked.port, "--server-port": asked.port}
    for place, word in enumerate(command[:-1]):
        if word in values:
            command[place + 1] = str(values[word])
    if "ollama" in command:
        command.insert(1, f"OLLAMA_HOST={asked.host}:{asked.port}")  # after `env`
    return command


def _start(command: list[str], server: Server, address: str, key: Mapping[str, str]) -> int:
    framework = server.framework
    command = _installed(command, framework)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1", **key}
    if framework == "vllm" and (os.cpu_count() or 1) <= FEW_CORES:
        # vLLM on a CPU keeps one core from its computing threads: of two, that is 12 tokens/s instead of 19 (0.5B).
        environment.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    process = subprocess.Popen(command, env=environment)
    asked_to_end: list[int] = []

    def passed_on(number: int, frame: Any) -> None:
        asked_to_end.append(number)
        process.send_signal(number)

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, passed_on)
    wait_s = os.environ.get("ENGINEWRIGHT_FIRST_TOKEN_S", str(FIRST_TOKEN_S))
    probe = subprocess.Popen(
        [sys.executable, str(PROBE), "wait", address, wait_s], stdout=subprocess.DEVNULL, env=environment
    )
    while probe.poll() is None and process.poll() is None and not asked_to_end:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    if probe.poll() == 0:
        click.echo(f"{server.name} is served at {address}", err=True)
    elif process.poll() is None and not asked_to_end:  # it lives, and no token has come
        _end(process)
        raise StageError(
            f"{framework}'s server gave no token within {wait_s} s, and was ended",
            hint="what it said is above; ENGINEWRIGHT_FIRST_TOKEN_S gives a large model longer",
        )
    elif not asked_to_end:
        _end(probe)
        raise StageError(f"{framework}'s server ended with exit code {process.returncode} before its first token")
    _end(probe)
    code = process.wait()
    return 0 if asked_to_end or code == 0 else 3


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, and make it."""
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _installed(command: list[str], framework: str) -> list[str]:
    """The command with the program that is here: on the path, or vLLM in its toolchain. UnavailableError for none."""
    name = next((word for word in command if word != "env" and "=" not in word), command[0])
    if shutil.which(name):
        return command
    if framework == "vllm":
        from pipeline.run.toolchain import interpreter

        with contextlib.suppress(UnavailableError):
            return [interpreter("vllm-cpu", {}), *_VLLM, *command[2:]]
    raise UnavailableError(
        f"{name} is not installed here", hint="install it, or say --compose or --kubernetes to run its container"
    )


def read_manifest(artifact: Path) -> dict[str, Any]:
    """manifest.json as it is; {} where there is none."""
    file = artifact / "manifest.json"
    found: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
    return found
