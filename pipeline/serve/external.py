"""The server that an artifact is for, where it is another project's: its command, container, port and probes.

What it is told comes from the manifest, whose arguments were checked against the model when it was built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from pipeline import tables
from pipeline.errors import RecipeError
from pipeline.frozen import frozen

_BY_LAYOUT = {"ollama": "ollama", "triton-model": "triton"}
_BY_RUNTIME = {"vllm": "vllm", "turbomind": "turbomind"}
_OTHERS = {"openvino": ("ovms",), "gguf": ("llama-server", "ollama")}
"""What may be asked for by name, beside our own server."""


@frozen
class Server:
    """How an artifact is served in a container, or on this machine."""

    framework: str
    name: str
    """Of the model."""
    command: tuple[str, ...]
    """On this machine; `{artifact}` stands for the folder. Empty: it is started in a container only."""
    arguments: tuple[str, ...]
    """In the container, after its entry point."""
    image: str
    port: int
    live: str
    ready: str
    """Path that says so; empty: one real token is asked for."""
    mount: str = "/model"
    gpus: int = 0
    size_bytes: int = 0
    """Of the artifact: less memory than that serves nothing."""
    environment: Mapping[str, str] = field(default_factory=dict)
    key: str = ""
    """The variable of its environment that holds the key of its clients; empty: it asks for none."""


def table() -> dict[str, dict[str, Any]]:
    """data/servers.toml"""
    return tables.table("servers")


def framework_of(manifest: Mapping[str, Any]) -> str:
    """Whose server the artifact is for: `enginewright` where it is ours."""
    runtime = manifest["runtime"]
    return _BY_LAYOUT.get(runtime["layout"]) or _BY_RUNTIME.get(runtime["engine"]) or "enginewright"


def server(manifest: Mapping[str, Any], framework: str = "", image: str = "", name: str = "") -> Server:
    """The server of a manifest. `name`: by which clients ask for the model, instead of the artifact's.

    Raises RecipeError for a framework that does not serve it, that knows no such name, or without an image.
    """
    runtime, own = manifest["runtime"], framework_of(manifest)
    known = dict.fromkeys((own, "enginewright", *_OTHERS.get(runtime["engine"], ())))
    if own in ("vllm", "turbomind", "triton"):
        known.pop("enginewright")
    asked = framework or own
    if asked not in known:
        raise RecipeError(f"{asked} does not serve this artifact", hint=f"one of: {', '.join(known)}")
    told = table()[asked]
    if name and "name" not in told and "{name}" not in "".join(told.get("command", ())):
        raise RecipeError(f"--name: {asked} calls the model what the artifact does", hint="leave it out")
    naming = (told["name"], name or str(manifest["name"])) if "name" in told else ()
    name = name or str(manifest["name"])
    command = tuple(map(str, runtime["command"])) if asked == own and asked != "enginewright" else ()
    arguments = tuple(
        word.format(name=name, entry=runtime["entry"]) for word in told.get("command", ())
    ) or _in_container(command, told)
    image = image or str(told.get("image", "")).format(version=_version(manifest, asked))
    if not image:
        raise RecipeError(f"{asked} has no image that is known here", hint="name one with --image")
    kind = manifest["target"]["device"]["kind"]
    return Server(
        framework=asked, name=name, command=(*command, *naming) if command else (),
        arguments=(*arguments, *naming), image=image, port=int(told["port"]), key=told.get("key", ""),
        live=told["live"], ready=told.get("ready", ""), mount=told.get("mount", "/model").format(name=name),
        gpus=_gpus(command) if kind == "cuda" else 0, environment=told.get("environment", {}),
        size_bytes=sum(int(file["size"]) for file in manifest.get("files", ())),
    )  # fmt: skip


def _in_container(command: tuple[str, ...], told: Mapping[str, Any]) -> tuple[str, ...]:
    """The manifest's command on the container's paths and address."""
    words, out = iter(command[told["cut"] :]), []
    for word in words:
        if word in told["unbind"]:
            next(words)
        else:
            out.append(word.replace("{artifact}", "/model"))
    return (*out, *told["bind"])


def _gpus(command: tuple[str, ...]) -> int:
    """One for each rank that the command asks for on this node."""
    count = 1
    for flag in ("--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size", "--tp", "--dp"):
        if flag in command:
            count *= int(command[command.index(flag) + 1])
    return count


def _version(manifest: Mapping[str, Any], framework: str) -> str:
    if framework == "enginewright":
        from pipeline import __version__

        return __version__
    needs = manifest["runtime"]["requires"]
    found = [need.get("exact") or need.get("min") or "" for need in needs.values()]
    version = next((each for each in found if each), "latest")
    return version if version.count(".") != 1 else f"{version}.0"
