"""Run a decoder over token ids with one layer's weights in memory: the model's own forward is the loop.

The model is built by transformers on torch's meta device, so that every family's masks and rotary tables are its own.
Each layer is replaced by a `_Station`, which reads the layer's weights when the forward pass arrives there, lets a
visitor work with them, and drops them. Activations are float32.

Legend: S samples, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.stages.checkpoint import Checkpoint, read_header
from pipeline.stages.llm.family import EMBED, Family
from pipeline.stages.llm.shards import ready, write_shard

Tensor = Any
CHUNK_TOKENS = 1024
"""How many tokens go through a layer at a time: what the intermediate activations take."""


class Visit(Protocol):
    """What a visitor is given: the layer's number, its module with weights, its input, and how to run it.

    It returns the layer's output [S, T, H].
    """

    def __call__(self, index: int, layer: Any, hidden_STH: Tensor, forward: Callable[[], Tensor]) -> Tensor: ...


def walk(
    folder: Path,
    family: Family,
    ids_ST: Tensor,
    visit: Visit,
    *,
    done: int = 0,
    carried_STH: Tensor | None = None,
    device: str = "cpu",
) -> None:
    """Visit every layer from number `done` on; `carried_STH` is what layer `done - 1` gave."""
    import torch

    checkpoint = Checkpoint(folder)
    with torch.inference_mode():
        base = skeleton(folder).model
        base.embed_tokens = rows_of(checkpoint, base.embed_tokens, device)
        base.rotary_emb.to(device)
        base.norm = torch.nn.Identity()
        held: dict[str, Tensor] = {} if carried_STH is None else {"hidden": carried_STH.to(device)}
        stations = [
            _station(index, layer, family, checkpoint, visit, device) if index >= done else _passed(held, layer)
            for index, layer in enumerate(base.layers)
        ]
        base.layers = torch.nn.ModuleList(stations)
        base(input_ids=ids_ST.to(device), use_cache=False)


def skeleton(folder: Path) -> Any:
    """The decoder on the meta device, but for what is computed from its configuration."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.model.config)
    return model.eval().requires_grad_(False)


def rows_of(checkpoint: Checkpoint, embedding: Any, device: str) -> Any:
    """A stand-in for the embedding that reads only the rows it is asked for."""
    import torch

    scale = float(getattr(embedding, "scalar_embed_scale", 1.0))

    class Rows(torch.nn.Module):  # type: ignore[misc]
        def forward(self, ids_ST: Tensor) -> Tensor:
            unique, places = torch.unique(ids_ST, return_inverse=True)
            stored = checkpoint[EMBED]
            rows = np.concatenate([stored.rows(number, number + 1) for number in unique.tolist()])
            return torch.from_numpy(rows).to(device)[places] * scale

    return Rows()


def _passed(held: dict[str, Tensor], layer: Any) -> Any:
    """A layer that was done before: its place gives what the last of them gave."""
    import torch

    class Passed(torch.nn.Module):  # type: ignore[misc]
        def forward(self, hidden_STH: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return held["hidden"]

    return _like(Passed(), layer)


def _like(module: Any, layer: Any) -> Any:
    """Give a stand-in what a decoder's loop asks of its layers."""
    for name in ("attention_type", "layer_type"):
        if hasattr(layer, name):
            setattr(module, name, getattr(layer, name))
    return module


def _station(index: int, layer: Any, family: Family, checkpoint: Checkpoint, visit: Visit, device: str) -> Any:
    import torch

    class Station(torch.nn.Module):  # type: ignore[misc]
        def forward(self, hidden_STH: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            def forward() -> Tensor:
                return _in_chunks(layer, hidden_STH, args, kwargs)

            with weights_of(layer, family.layer(index), checkpoint, device):
                return visit(index, layer, hidden_STH, forward)

    return _like(Station(), layer)


def _in_chunks(layer: Any, hidden_STH: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The layer over a few samples at a time, each attending to its own tokens."""
    import torch

    samples, tokens = hidden_STH.shape[:2]
    step = max(1, CHUNK_TOKENS // tokens)
    out = torch.empty_like(hidden_STH)
    for start in range(0, samples, step):
        part = slice(start, start + step)

        def cut(value: Any, part: slice = part) -> Any:
            if isinstance(value, tuple):
                return tuple(cut(each) for each in value)
            whole = torch.is_tensor(value) and value.shape[:1] == (samples,) and samples > 1
            return value[part] if whole else value

        found = layer(hidden_STH[part], *map(cut, args), **{name: cut(value) for name, value in kwargs.items()})
        out[part] = found[0] if isinstance(found, tuple) else found
    return out


@contextmanager
def weights_of(layer: Any, prefix: str, checkpoint: Checkpoint, device: str) -> Iterator[None]:
    """The layer's parameters as float32 inside, on the meta device again after it."""
    import torch

    names = [name for name, _ in layer.named_parameters()]
    for name in names:
        put(layer, name, torch.from_numpy(checkpoint.take(prefix + name).numpy()).to(device))
    try:
        yield
    finally:
        for name in names:
            put(layer, name, torch.empty(0, device="meta"))


def put(layer: Any, name: str, value: Tensor) -> None:
    """Replace a parameter by a tensor."""
    import torch

    holder, _, leaf = name.rpartition(".")
    setattr(layer.get_submodule(holder), leaf, torch.nn.Parameter(value, requires_grad=False))


# --- what is carried from one layer to the next, across a kill --------------------------------------------------------


def carry(folder: Path, index: int, hidden_STH: Tensor) -> None:
    """Keep what layer `index` gave, and drop what the one before it gave."""
    write_shard(folder / f"carried-{index:05d}.safetensors", [ready("hidden", hidden_STH)])
    (folder / f"carried-{index - 1:05d}.safetensors").unlink(missing_ok=True)


def carried(folder: Path) -> tuple[int, Tensor | None]:
    """(how many layers are done, what the last of them gave) of an attempt that was cut off."""
    import torch

    kept = sorted(folder.glob("carried-*.safetensors"))
    if not kept:
        return 0, None
    hidden = read_header(kept[-1])["hidden"].numpy()
    return int(kept[-1].stem.removeprefix("carried-")) + 1, torch.from_numpy(hidden)
