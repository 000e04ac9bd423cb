"""From token vectors to the sentence embedding, as a sentence-transformers folder describes it."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import RecipeError
from pipeline.frozen import frozen

_OLD_NAMES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@frozen
class Pooling:
    """How token vectors become one vector."""

    mode: str
    """`mean` over the tokens that are not padding, or `cls`: the first token's vector."""
    normalize: bool
    """Whether the vector is scaled to length one."""

    def __call__(self, tokens: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """[T, H] without padding -> [H]."""
        vector: npt.NDArray[Any] = tokens[0] if self.mode == "cls" else tokens.mean(axis=0, dtype=np.float64)
        if self.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        result: npt.NDArray[np.float32] = vector.astype(np.float32)
        return result


def read_pooling(folder: Path) -> Pooling | None:
    """The pooling of a sentence-transformers folder; None for any other. What is not known raises RecipeError."""
    file = folder / "modules.json"
    if not file.is_file():
        return None
    modules = _json(file)
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise RecipeError(
            f"modules.json: modules {', '.join(kinds)} are not supported",
            hint="Transformer, Pooling and an optional Normalize are; without modules.json the token vectors are built",
        )
    relative = PurePosixPath(str(modules[1]["path"]))
    if relative.is_absolute() or ".." in relative.parts:
        raise RecipeError(
            f"modules.json: the path {relative} leaves the folder", hint="name a folder inside the model's"
        )
    config = _json(folder / relative / "config.json")
    mode = config.get("pooling_mode")
    if mode is None:
        active = [name for old, name in _OLD_NAMES.items() if config.get(old)]
        mode = active[0] if len(active) == 1 else active
    if mode not in ("mean", "cls"):
        raise RecipeError(f"{relative}/config.json: pooling {mode!r} is not supported", hint="mean and cls are")
    return Pooling(mode, normalize="Normalize" in kinds)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path.parent.name}/{path.name}: cannot be read: {error}", hint="fetch it again") from error
