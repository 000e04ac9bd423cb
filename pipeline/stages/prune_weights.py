"""Which weights go: scores from calibration, a mask for every four, and the checkpoint written anew with the zeros.

Weights are read, masked and written one tensor at a time; Wanda holds the model in torch while it measures.

Legend: N output channels, K input channels.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import RecipeError, StageError
from pipeline.stages import samples as text
from pipeline.stages.checkpoint import FLOATS, Checkpoint, Tensor
from pipeline.stages.prune import PruneOptions
from pipeline.step import Inputs, Progress

F32 = npt.NDArray[np.float32]

GROUP, KEPT = 4, 2
_ROWS = 1024
"""Of a weight that are masked at once."""


def prune(inputs: Inputs, options: PruneOptions, out: Path, progress: Progress) -> None:
    """See stage `prune`."""
    from pipeline.stages.tasks import load_model

    model = load_model(inputs["model"], options.task, options.trust_remote_code)
    checkpoint = Checkpoint(inputs["model"])
    products = _products(model, checkpoint, options.exclude)
    norms = _norms(model, products, inputs, options, progress) if options.method == "wanda" else {}
    del model
    for path in sorted(inputs["model"].rglob("*")):
        if path.is_file():
            place = out / path.relative_to(inputs["model"])
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    for done, (name, (tensor, transposed)) in enumerate(sorted(products.items())):
        progress(done, len(products), tensor.name)
        write(out / tensor.path.relative_to(inputs["model"]), tensor, norms.get(name), transposed)
    progress(len(products), len(products))


def mask(weight_NK: F32, norm_K: F32 | None = None) -> npt.NDArray[np.bool_]:
    """True where a weight stays: exactly two of every four along K, those with the larger score.

    Of equal scores the earlier stays, so that the result does not depend on a sort.
    """
    score = np.abs(weight_NK) if norm_K is None else np.abs(weight_NK) * norm_K
    fours = score.reshape(len(weight_NK), -1, GROUP)
    order = np.argsort(-fours, axis=-1, kind="stable")
    keep = np.zeros(fours.shape, bool)
    np.put_along_axis(keep, order[..., :KEPT], True, axis=-1)
    return keep.reshape(weight_NK.shape)


def write(path: Path, tensor: Tensor, norm_K: F32 | None, transposed: bool) -> None:
    """Set weights of a tensor to zero in the file at `path`, a copy of the one that the tensor describes.

    `transposed`: the tensor is stored [K, N]. What stays is untouched, bit by bit.
    """
    with path.open("r+b") as file:
        if transposed:  # groups lie along the rows: all of them are needed at once
            raw_KN = tensor.numpy("native")
            raw_KN[~mask(np.ascontiguousarray(tensor.numpy().T), norm_K).T] = 0
            file.seek(tensor.offset)
            file.write(raw_KN.tobytes())
            return
        for start in range(0, tensor.shape[0], _ROWS):
            stop = min(start + _ROWS, tensor.shape[0])
            raw_NK = tensor.rows(start, stop, "native")
            raw_NK[~mask(tensor.rows(start, stop), norm_K)] = 0
            file.seek(tensor.offset + start * (tensor.length // tensor.shape[0]))
            file.write(raw_NK.tobytes())


def _products(model: Any, checkpoint: Checkpoint, exclude: tuple[str, ...]) -> dict[str, tuple[Tensor, bool]]:
    """Module name -> (its weight in the checkpoint, whether that is stored [K, N]): the products of the layers.

    Embeddings, heads and poolers stay dense: they are outside of the numbered layers.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    found: dict[str, tuple[Tensor, bool]] = {}
    unmatched, names = set(exclude), []
    for name, module in model.named_modules():
        transposed = isinstance(module, Conv1D)
        if not (transposed or isinstance(module, torch.nn.Linear)):
            continue
        if not any(part.isdigit() for part in name.split(".")):
            continue
        names.append(name)
        matches = {pattern for pattern in exclude if fnmatch(name, pattern)}
        unmatched -= matches
        columns = module.weight.shape[0 if transposed else 1]
        if not matches and columns % GROUP == 0:
            found[name] = _find(checkpoint, f"{name}.weight", tuple(module.weight.shape)), transposed
    if unmatched:
        raise RecipeError(
            f"prune.exclude: '{sorted(unmatched)[0]}' matches no product of the layers",
            hint=f"names are like {', '.join(names[:3])}",
        )
    if not found:
        raise RecipeError(
            "prune: the model has no product in numbered layers that 2:4 could prune", hint="leave `prune` out"
        )
    return found


def _find(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of a parameter. A checkpoint may have a prefix that transformers drops, or lack one."""
    fits = [
        key
        for key in checkpoint
        if (key == name or key.endswith(f".{name}") or name.endswith(f".{key}")) and checkpoint[key].shape == shape
    ]
    if name in fits:
        fits = [name]
    if len(fits) != 1 or checkpoint[fits[0]].dtype not in FLOATS:
        raise StageError(
            f"prune: the checkpoint does not store '{name}' {list(shape)} as one tensor of floats",
            hint="exclude that product, or prune before the weights are quantized or merged",
        )
    return checkpoint[fits[0]]


def _norms(
    model: Any, products: Mapping[str, Any], inputs: Inputs, options: PruneOptions, progress: Progress
) -> dict[str, F32]:
    """Module name -> the norm of each of its input channels [K] over the calibration data."""
    import torch

    sums: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, given: tuple[Any, ...]) -> None:
            rows = given[0].reshape(-1, given[0].shape[-1])
            sums[name] = sums.get(name, 0) + rows.double().square().sum(0)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in products]
    try:
        for index, feed in enumerate(_samples(model, inputs, options)):
            progress(index, options.samples, "calibration")
            with torch.no_grad():
                model(**feed)
    finally:
        for handle in handles:
            handle.remove()
    silent = sorted(set(products) - set(sums))
    if silent:
        raise StageError(f"prune: no calibration sample reaches '{silent[0]}'", hint="exclude it, or use magnitude")
    return {name: total.sqrt().numpy().astype(np.float32) for name, total in sums.items()}


def _samples(model: Any, inputs: Inputs, options: PruneOptions) -> Iterator[dict[str, Any]]:
    import torch

    encoder = text.load_encoder(inputs["model"], int(model.config.get_text_config().vocab_size))
    data = text.data_file(inputs["calibration"])
    positions = getattr(model.config, "max_position_embeddings", None)
    length = min(options.length, positions) if isinstance(positions, int) else options.length
    if options.task == "text-generation":
        for ids in text.windows(data, encoder, options.samples, length):
            yield {"input_ids": torch.from_numpy(ids)[None]}
        return
    for encoded in text.sequences(data, encoder, options.samples, length):
        yield {"input_ids": torch.tensor([encoded.ids]), "attention_mask": torch.ones(1, len(encoded.ids)).long()}
