"""`enginewright serve`: an artifact behind OpenAI's API, on this machine."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.cli import serve_external, transfer
from pipeline.errors import RecipeError, UnavailableError
from pipeline.registry import reference

KEY_VARIABLE = "ENGINEWRIGHT_API_KEY"


@click.command()
@click.argument("artifact", metavar="ARTIFACT|REF")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on. Loopback: this machine.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="By which clients ask for the model. Default: the artifact's name.")
@click.option(
    "--batch",
    type=click.IntRange(1, 1024),
    default=16,
    show_default=True,
    help="Prompts, choices and beams that are decoded together.",
)
@click.option(
    "--queue", type=click.IntRange(0), default=256, show_default=True, help="Requests that may wait; one more gets 429."
)
@click.option(
    "--max-body",
    type=click.IntRange(1024),
    default=8 << 20,
    show_default=True,
    help="Largest body of a request, in bytes.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="Longest answer, in seconds.",
)
@click.option(
    "--drain",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="After SIGTERM: seconds for what is under way.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help=f"Keys, one a line, of which a client needs one. Default: the key in ${KEY_VARIABLE}, if set.",
)
@click.option("--no-verify", is_flag=True, help="Do not check the artifact's digests first.")
@transfer.target_name
@transfer.policy_file
@transfer.verify_key
@transfer.out
@transfer.plain_http
@serve_external.options
def serve(
    artifact: str, target: str | None, policy_path: Path | None, keys: Sequence[Path], out: Path, plain_http: bool,
    host: str, port: int, name: str | None, batch: int, queue: int, max_body: int, timeout: float, drain: float,
    api_key_file: Path | None, no_verify: bool, write: str, framework: str, image: str, claim: str,
) -> int:  # fmt: skip
    """Serve the ARTIFACT in a folder behind OpenAI's API, with server-sent events and a WebSocket.

    A REF is pulled first, into artifacts/NAME/TARGET, as `pull` does.

    Text generation, embeddings and classification; see /openapi.json and docs/serve.md. The server is ready when it
    has generated one real token. SIGTERM ends it after what is under way.

    An artifact for vLLM, LMDeploy or Ollama is handed to that server, with the arguments of its manifest.
    """
    folder = Path(artifact)
    if not folder.is_dir() and reference.is_reference(artifact):
        folder = pulled(artifact, target, policy_path, keys, out, plain_http)
    api_keys = _keys(api_key_file)
    told = serve_external.read_manifest(folder)
    asked = serve_external.Asked(
        write, framework, image, claim, host, port, name or "", api_keys, api_key_file is not None, _given()
    )  # fmt: skip
    if told and serve_external.concerns(told, asked):
        from pipeline.artifact.verify import verify

        if not no_verify:
            verify(folder)
        return serve_external.handle(folder, told, asked)
    from pipeline.cli.opening import open_artifact

    engine = open_artifact(folder, verify=not no_verify)
    try:
        from pipeline.serve import server
        from pipeline.serve.served import Served

        manifest = _manifest(folder)
        served = Served.of(folder, engine, manifest, name or manifest.get("name") or folder.resolve().name)
        options = server.Options(host, port, batch, queue, max_body, timeout, drain, api_keys)
        if host not in ("127.0.0.1", "::1", "localhost") and not api_keys:
            click.echo("warning: anybody who reaches this address may use it: give --api-key-file", err=True)
        server.serve(served, options, lambda address: click.echo(f"{served.name} is served at {address}", err=True))
    except ImportError as error:
        raise UnavailableError(f"{error.name} is not installed", hint="pip install 'enginewright[serve]'") from error
    return 0


def _given() -> dict[str, str]:
    """Options of our own server that were said on the command line."""
    context, found = click.get_current_context(), {}
    for parameter in ("batch", "queue", "max_body", "timeout", "drain"):
        if context.get_parameter_source(parameter) is click.core.ParameterSource.COMMANDLINE:
            found[f"--{parameter.replace('_', '-')}"] = str(context.params[parameter])
    return found


def pulled(
    ref: str, target: str | None, policy_path: Path | None, keys: Sequence[Path], out: Path, plain_http: bool
) -> Path:
    """The folder of what `pull` brings; what it says goes to standard error."""
    from pipeline.cli.pull import pull

    with contextlib.redirect_stdout(io.StringIO()) as said:
        told = {"policy_path": policy_path, "keys": tuple(keys), "out": out, "plain_http": plain_http, "form": "json"}
        click.get_current_context().invoke(pull, ref=ref, target=target, **told)
    document = json.loads(said.getvalue())
    click.echo(f"{document['reference']}: {document['target']}, {document['artifact_id']}", err=True)
    return Path(document["path"])


def _manifest(folder: Path) -> dict[str, Any]:
    from pipeline.artifact.manifest import artifact_id

    file = folder / "manifest.json"
    if not file.is_file():
        return {}
    data = file.read_bytes()
    manifest = json.loads(data)
    return {"name": manifest["name"], "artifact_id": artifact_id(data)}


def _keys(file: Path | None) -> tuple[str, ...]:
    if file is None:
        return tuple(filter(None, [os.environ.get(KEY_VARIABLE, "")]))
    try:
        keys = tuple(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeError) as error:
        raise RecipeError(f"{file} cannot be read: {error}", hint="give a text file with a key a line") from error
    if not keys:
        raise RecipeError(f"{file} has no key", hint="write one key a line")
    return keys
