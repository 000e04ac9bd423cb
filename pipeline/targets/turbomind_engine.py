"""The Engine over LMDeploy's TurboMind. Needs CUDA; refuses LMDeploy's silent fallback to its PyTorch engine.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engine import Array, Sampling, Token
from pipeline.errors import RecipeError, StageError, UnavailableError


def open_engine(folder: Path, settings: Mapping[str, Any]) -> TurbomindEngine:
    """An LMDeploy pipeline over the folder. `settings` are fields of TurbomindEngineConfig.

    Raises UnavailableError where lmdeploy is missing or would not use TurboMind, RecipeError for a field that this
    version does not have: LMDeploy itself drops it.
    """
    try:
        import lmdeploy  # type: ignore[import-not-found,unused-ignore]
        from lmdeploy.archs import autoget_backend  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise UnavailableError(f"lmdeploy does not import: {error}", hint="pip install lmdeploy==0.18.0") from error
    known = set(getattr(lmdeploy.TurbomindEngineConfig, "__dataclass_fields__", ()))
    if unknown := sorted(set(settings) - known):
        raise RecipeError(f"this LMDeploy's engine config has no field {unknown[0]!r}")
    found = autoget_backend(str(folder))
    if found != "turbomind":
        raise UnavailableError(
            f"LMDeploy would run this folder with its {found!r} engine, not with TurboMind",
            hint="needs a CUDA device, and the libraries that _turbomind links to",
        )
    pipeline = lmdeploy.pipeline(str(folder), backend_config=lmdeploy.TurbomindEngineConfig(**settings))
    backend = getattr(getattr(pipeline, "async_engine", pipeline), "backend", "")
    if backend != "turbomind":
        raise StageError(f"LMDeploy runs on {backend!r}, not on TurboMind")
    return TurbomindEngine(lmdeploy, pipeline)


class TurbomindEngine:
    """The Engine of a text-generation folder."""

    def __init__(self, lmdeploy: Any, pipeline: Any) -> None:
        self._lmdeploy = lmdeploy
        self._pipeline = pipeline

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """`input_ids` [B, T] and `attention_mask` [B, T] -> `logits` [B, T, V] float32."""
        ids = np.asarray(inputs["input_ids"])
        mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids)))
        rows = [ids[row][mask[row] != 0].tolist() for row in range(len(ids))]
        logits: Array | None = None
        engine = self._pipeline.async_engine
        for row, answer in enumerate(self._pipeline._run(coro=engine.async_get_logits(input_ids=rows)).result()):
            found = np.asarray(answer.float().cpu())[: len(rows[row])]
            logits = np.zeros((*ids.shape, found.shape[-1]), np.float32) if logits is None else logits
            logits[row, np.flatnonzero(mask[row])] = found
        assert logits is not None
        return {"logits": logits}

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Token]:
        """Token ids in, tokens out, all of a prompt's together. Raises RecipeError for beams."""
        if sampling.beams > 1:
            raise RecipeError("this engine searches no beams", hint="leave --beams out")
        ends = sampling.eos_token_ids
        told = self._lmdeploy.GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or 1.0,
            top_k=sampling.top_k or 0,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            random_seed=sampling.seed,
            ignore_eos=ends is not None,
            stop_token_ids=list(ends) if ends else None,
            logprobs=1,
        )
        for number, answer in enumerate(self._infer([list(map(int, each)) for each in prompts], told)):
            tokens = list(answer.token_ids)
            for place, (token, found) in enumerate(zip(tokens, answer.logprobs, strict=True), 1):
                yield Token(number, int(token), float(found[token]), place == len(tokens))

    def _infer(self, rows: list[list[int]], told: Any) -> list[Any]:
        """Token ids in, as they are: LMDeploy's pipeline would put a chat template around a text."""
        engine = self._pipeline.async_engine

        async def one(ids: list[int]) -> Any:
            session, last = engine.session_mgr.get(), None
            try:
                async with session.request_handle() as handle:
                    given = {"session": session, "input_ids": ids, "gen_config": told, "stream_output": False}
                    async with engine.safe_run(handle, **given) as outputs:
                        async for each in outputs:
                            last = each
            finally:
                engine.session_mgr.remove(session)
            return last

        return [self._pipeline._run(coro=one(ids)).result() for ids in rows]
