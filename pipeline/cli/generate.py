"""`enginewright generate`: text from an artifact, on this machine."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.opening import open_artifact, read_json
from pipeline.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipeline.engine import Engine, Sampling, Token


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, help="The prompt; `-` reads it from stdin.")
@click.option("--chat", is_flag=True, help="Put the prompt as a user's message into the model's chat template.")
@click.option("--system", help="With --chat: a system message before it.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="The most.")
@click.option("--beams", type=click.IntRange(min=1), default=1, show_default=True, help="Above 1: beam search.")
@click.option("--length-penalty", type=float, default=1.0, show_default=True, help="Of the beam search.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0 keeps all tokens.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="1 keeps all."
)
@click.option("--min-p", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="0 keeps all.")
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Above 1: less likely to repeat.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="With a temperature above 0.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end token.")
@click.option("--stats", is_flag=True, help="Write tokens/s and the time to the first token to stderr.")
@click.option("--no-verify", is_flag=True, help="Do not check the artifact's digests first.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", help="json: one document.")
def generate(
    artifact: Path,
    prompt: str,
    chat: bool,
    system: str | None,
    max_new_tokens: int,
    ignore_eos: bool,
    stats: bool,
    no_verify: bool,
    form: str,
    **sampled: Any,
) -> int:
    """Generate text with the ARTIFACT in a folder, greedily unless a temperature is given.

    The text streams to stdout as it becomes known. Ctrl-C ends it, with what was generated so far.
    """
    if system is not None and not chat:
        raise RecipeError("--system is a message of a chat", hint="add --chat")
    started = time.perf_counter()
    engine = open_artifact(artifact, verify=not no_verify)
    from pipeline.engine import Sampling
    from pipeline.text import chat_prompt, load_tokenizer

    tokenizer = load_tokenizer(artifact)
    text = _text(prompt)
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        text = chat_prompt(artifact, [*messages, {"role": "user", "content": text}])
    ids = tokenizer.encode(text, add_special_tokens=not chat).ids
    sampling = Sampling(max_new_tokens=max_new_tokens, eos_token_ids=() if ignore_eos else None, **sampled)
    run = _Run(time.perf_counter() - started)
    show = sys.stdout.write if form == "text" else lambda _: None
    try:
        _stream(run, engine, tokenizer, ids, sampling, show)
    except BrokenPipeError:
        # Whoever read has seen enough. Python would complain once more when it flushes at exit.
        sys.stdout = None
        return 0
    if form == "json":
        click.echo(json.dumps(_document(run, ids, () if ignore_eos else _ends(artifact)), ensure_ascii=False))
    else:
        click.echo()
    if stats:
        click.echo(_summary(run, len(ids)), err=True)
    return 130 if run.interrupted else 0


@dataclass
class _Run:
    """What was generated, and when."""

    open_s: float
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    first_s: float = 0.0
    """From the start of the generation to its first token."""
    total_s: float = 0.0
    interrupted: bool = False

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding speed after the first token; None where there was nothing to measure."""
        decoding_s = self.total_s - self.first_s
        return (len(self.tokens) - 1) / decoding_s if len(self.tokens) > 1 and decoding_s > 0 else None


def _text(prompt: str) -> str:
    """The prompt, from stdin if it is `-`."""
    try:
        # Python marks bytes that are not UTF-8 in arguments and stdin by half characters, which no tokenizer takes.
        return sys.stdin.buffer.read().decode() if prompt == "-" else prompt.encode().decode()
    except UnicodeError as error:
        where = "stdin" if prompt == "-" else "the prompt"
        raise RecipeError(f"{where} is not UTF-8: {error}", hint="convert it, for example with iconv") from error


def _stream(
    run: _Run, engine: Engine, tokenizer: Any, ids: list[int], sampling: Sampling, show: Callable[[str], Any]
) -> None:
    """Generate into `run`, showing the text as it becomes known. Ctrl-C ends it and is noted."""
    from pipeline.text import Detokenizer

    words = Detokenizer(tokenizer, ids)
    started = time.perf_counter()

    def add(piece: str) -> None:
        run.text += piece
        show(piece)
        sys.stdout.flush()

    tokens: Iterator[Token] = engine.generate([ids], sampling)
    try:
        for token in tokens:
            run.total_s = time.perf_counter() - started
            run.first_s = run.first_s or run.total_s
            run.tokens.append(token)
            add(words.add(token.token_id))
    except KeyboardInterrupt:
        run.interrupted = True
    add(words.flush())


def _ends(artifact: Path) -> tuple[int, ...]:
    """The model's end tokens, as the engine reads them, or as transformers does."""
    for name, keys in (("engine.json", ("decoder", "eos_token_ids")), ("generation_config.json", ("eos_token_id",))):
        found: Any = read_json(artifact / name) if (artifact / name).is_file() else None
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return ()


def _document(run: _Run, prompt: list[int], ends: tuple[int, ...]) -> dict[str, Any]:
    """What `--format json` prints. finish_reason: `stop` at the end token, `length` at the limit or the context's."""
    ended = bool(run.tokens) and run.tokens[-1].token_id in ends
    speed = run.tokens_per_s
    return {
        "text": run.text,
        "token_ids": [token.token_id for token in run.tokens],
        "logprobs": [round(token.logprob, 6) for token in run.tokens],
        "finish_reason": "interrupted" if run.interrupted else "stop" if ended else "length",
        "prompt_tokens": len(prompt),
        "completion_tokens": len(run.tokens),
        "stats": {
            "open_s": round(run.open_s, 4),
            "first_token_s": round(run.first_s, 4),
            "tokens_per_s": None if speed is None else round(speed, 2),
        },
    }


def _summary(run: _Run, prompt: int) -> str:
    speed = run.tokens_per_s
    return (
        f"{prompt} prompt tokens, {len(run.tokens)} new ones; opened in {run.open_s:.2f} s, first token after "
        f"{run.first_s * 1000:.0f} ms, then {'-' if speed is None else f'{speed:.1f}'} tokens/s"
    )
