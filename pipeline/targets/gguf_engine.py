"""The Engine over llama.cpp, which runs in a child process: what ends it there is an error here, not our end.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import pipeline
from pipeline import hardware
from pipeline.decoding import Decoder, decode
from pipeline.engine import Array, Sampling, Token
from pipeline.errors import BY_EXIT_CODE, RecipeError, StageError
from pipeline.frozen import frozen
from pipeline.targets.gguf_child import receive, send
from pipeline.targets.ort_decoder import check_ids, token_inputs

CHILD = (sys.executable, "-P", "-m", "pipeline.targets.gguf_child")
MOST_ROWS = 256
"""llama.cpp's limit of sequences in one context."""
_SERVED_ROWS = 16
"""Sequences of a context that prompts join and leave."""
_SERVED_TOKENS = (8192, 32768)
"""Its least and its largest size: llama.cpp reserves the whole cache when it opens one."""
_TAIL = 12  # lines of llama.cpp's own words that an error shows
SETTINGS = {"kv": "F16", "threads": 0, "gpu_layers": 0}


def open_engine(folder: Path, settings: Mapping[str, Any] | None = None) -> LlamaEngine:
    """Open an engine's folder, or an artifact's. `settings` (kv, threads, gpu_layers) go over those of engine.json."""
    try:
        decoder = read_engine_json(folder)["decoder"]
        shape = Shape(decoder["vocab_size"], decoder["context_length"], tuple(decoder["eos_token_ids"]))
    except (KeyError, TypeError) as error:
        raise StageError(
            f"{folder / 'engine.json'}: field {error} is missing or wrong", hint="build it again"
        ) from error
    return LlamaEngine(open_file(folder, settings), shape)


def open_file(folder: Path, settings: Mapping[str, Any] | None = None, *, vocab_only: bool = False) -> Child:
    """The GGUF file of an engine's folder in a child process; `vocab_only` reads no weights, to tokenize alone."""
    engine = read_engine_json(folder)
    known = {**SETTINGS, **(engine.get("settings") or {}), **(settings or {})}
    if unknown := sorted(set(known) - set(SETTINGS)):
        raise RecipeError(
            f"settings of the gguf engine: unknown {unknown[0]!r}", hint=f"they are {', '.join(SETTINGS)}"
        )
    if known["kv"] not in ("F32", "F16"):
        raise RecipeError(f"settings of the gguf engine: kv is {known['kv']!r}", hint="it is F32 or F16")
    try:
        file = folder / engine["components"]["model"]
    except (KeyError, TypeError) as error:
        raise StageError(
            f"{folder / 'engine.json'}: field {error} is missing or wrong", hint="build it again"
        ) from error
    if not file.is_file():
        raise StageError(f"{file} is missing", hint="run `enginewright verify` on the artifact")
    return Child(file, **known, vocab_only=vocab_only)


def read_engine_json(folder: Path) -> dict[str, Any]:
    """engine.json of a gguf engine. Raises StageError naming what is wrong with it."""
    file = folder / "engine.json"
    try:
        engine = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError(
            f"{file} cannot be read: {error}", hint="give the folder of an engine or an artifact"
        ) from error
    if not isinstance(engine, dict) or engine.get("runtime") != "gguf":
        raise StageError(f"{file} is not of an engine for gguf", hint="open it with the runtime that it names")
    return engine


@frozen
class Shape:
    """What engine.json says of the decoder."""

    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]


class Child:
    """The process that holds llama.cpp, and one GGUF file in it."""

    def __init__(self, file: Path, *, kv: str, threads: int, gpu_layers: int, vocab_only: bool = False) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the child
        root = str(Path(pipeline.__file__).parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            CHILD,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            # ggml would start a debugger on itself to print addresses.
            env={**os.environ, "PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"},
        )
        self.close = weakref.finalize(self, _end, self._process, self._log)
        threads = threads or hardware.probe().cores or 1
        self.ask("open", file=str(file), kv=kv, threads=threads, gpu_layers=gpu_layers, vocab_only=vocab_only)

    def ask(self, do: str, **arguments: Any) -> tuple[dict[str, Any], bytes]:
        """One question, one answer. StageError with llama.cpp's last words when the process ends over it."""
        assert self._process.stdin and self._process.stdout
        try:
            send(self._process.stdin, {"do": do, **arguments})
            answer = receive(self._process.stdout)
        except BrokenPipeError:
            answer = None
        if answer is None:
            raise StageError(f"llama.cpp {self._death()} while it was asked to {do}", hint=self._words())
        if error := answer[0].get("error"):
            code, message, hint = error
            told = "\n".join(filter(None, (hint, self._words()))) if code == StageError.exit_code else hint
            raise BY_EXIT_CODE.get(code, StageError)(message, hint=told)
        return answer

    def logits(self, do: str, **arguments: Any) -> Array:
        """An answer that is logits [rows, V] float32."""
        header, payload = self.ask(do, **arguments)
        return np.frombuffer(payload, np.float32).reshape(header["rows"], -1)

    def tokenize(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Token ids of texts by llama.cpp; `special` adds bos and eos as the file says."""
        found: list[list[int]] = self.ask("tokenize", texts=list(texts), special=special)[0]["ids"]
        return found

    def _death(self) -> str:
        code = self._process.wait()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        # ggml prints where it was called from, by addresses that say nothing without symbols.
        said = [line for line in lines if line.strip(" .") and "(+0x" not in line]
        return "llama.cpp said:\n" + "\n".join(said[-_TAIL:]) if said else ""


def _end(process: subprocess.Popen[bytes], log: Any) -> None:
    for stream in (process.stdin, process.stdout):
        if stream:
            with contextlib.suppress(BrokenPipeError):  # a question that a dead process will not read
                stream.close()
    process.kill()
    process.wait()
    log.close()


class LlamaEngine:
    """The Engine of a GGUF artifact."""

    def __init__(self, child: Child, shape: Shape) -> None:
        self.child = child
        self._shape = shape
        self._turns = 0

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """`input_ids` [B, T] and `attention_mask` [B, T] (0 = padding, on either side; may be absent) -> `logits`
        [B, T, V] float32. What stands at padding is zero."""
        ids, mask = token_inputs(inputs, self._shape.vocab_size)
        logits = np.zeros((*ids.shape, self._shape.vocab_size), np.float32)
        for row in range(len(ids)):
            kept = np.flatnonzero(mask[row])
            if not len(kept) or kept[-1] - kept[0] + 1 != len(kept):
                raise RecipeError(
                    "attention_mask has a row without tokens, or with padding between tokens",
                    hint="put padding at the start or at the end of a row",
                )
            logits[row, kept] = self.child.logits("run", ids=ids[row, kept].tolist())
        return {"logits": logits}

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Token]:
        """Token ids in, tokens out, each at most to the end of the context. See `pipeline.decoding`."""
        check_ids(prompts, self._shape.vocab_size)
        rows = len(prompts) * max(1, sampling.beams)
        if rows > MOST_ROWS:
            raise RecipeError(
                f"{len(prompts)} prompts of {max(1, sampling.beams)} beams are {rows} sequences, {MOST_ROWS} at most",
                hint="give fewer prompts at once",
            )
        ends, context = self._shape.eos_token_ids, self._shape.context_length
        return decode(self._stepper(rows), prompts, prompts, sampling, eos_token_ids=ends, context_length=context)

    def decoder(self) -> Decoder:
        """For those who let prompts join and leave: see `pipeline.decoding.Batch`. One may run at a time."""
        shape = self._shape
        tokens = max(_SERVED_TOKENS[0], min(shape.context_length, _SERVED_TOKENS[1]))
        stepper = self._stepper(_SERVED_ROWS, tokens)
        return Decoder(stepper, shape.vocab_size, shape.eos_token_ids, shape.context_length, _SERVED_ROWS, tokens)

    def _stepper(self, rows: int, tokens: int = 0) -> _Stepper:
        self._turns += 1
        return _Stepper(self.child, rows, self._turns, tokens)


@frozen
class _Stepper:
    child: Child
    rows: int
    turn: int
    tokens: int
    """Room for so many tokens of all sequences, where prompts may join; 0: as many as the first ones need."""

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[None, Array]:
        told = {"room": room, "rows": self.rows, "turn": self.turn, "tokens": self.tokens}
        return None, self.child.logits("prefill", prompts=_plain(prompts), **told)

    def extend(self, state: None, prompts: Sequence[Sequence[int]], room: int) -> Array:
        return self.child.logits("extend", prompts=_plain(prompts), turn=self.turn)

    def step(self, state: None, tokens: Sequence[int], rows: Sequence[int]) -> Array:
        fed = [int(token) for token in tokens]
        return self.child.logits("step", tokens=fed, rows=list(rows), turn=self.turn)


def _plain(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[int(token) for token in prompt] for prompt in prompts]
