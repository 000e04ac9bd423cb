"""A causal language model with its KV cache as a flat module: the generic path for architectures without a fused graph.

Legend: B batch, S new tokens, P tokens in the cache, T = P + S, K key-value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

from pipeline.errors import StageError
from pipeline.stages.onnx.torch_export import Port, export_module

CACHE_AXES = ("batch", None, "past_sequence", None)
_PRESENT_AXES = ("batch", None, "total_sequence", None)


def export_decoder(model: Any, opset: int) -> tuple[Any, tuple[int, int, int]]:
    """The graph of a decoder (onnx_ir.Model) and its cache's (layers, kv_heads, head_dim).

    input_ids [B, S] and attention_mask [B, T] int64, past_key_values.{i}.key|value [B, K, P, D] -> logits [B, S, V],
    present.{i}.key|value [B, K, T, D]. Positions are counted inside the graph from attention_mask, so padding may be
    on either side. StageError for models whose state is not keys and values of one shape per layer.
    """
    import torch

    layers, kv_heads, head_dim = cache_shape(model)
    ids = torch.arange(9).remainder(int(model.config.vocab_size)).reshape(3, 3)
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[1, :2] = 0
    ports = [
        Port("input_ids", ids, ("batch", "sequence")),
        Port("attention_mask", mask, ("batch", "total_sequence")),
        *cache_ports("past_key_values", layers, (3, kv_heads, 5, head_dim), CACHE_AXES),
    ]
    outputs = {"logits": ("batch", "sequence", None), **cache_outputs(layers, _PRESENT_AXES)}
    return export_module(_module(model), ports, outputs, opset), (layers, kv_heads, head_dim)


def cache_ports(prefix: str, layers: int, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> list[Port]:
    """Ports `prefix`.{i}.key and .value for every layer."""
    import torch

    names = [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    return [Port(name, torch.zeros(shape), axes) for name in names]


def cache_outputs(
    layers: int, axes: tuple[str | None, ...], prefix: str = "present"
) -> dict[str, tuple[str | None, ...]]:
    """Output names `prefix`.{i}.key and .value for every layer, with their axes."""
    return {f"{prefix}.{layer}.{part}": axes for layer in range(layers) for part in ("key", "value")}


def filled_cache(flat: tuple[Any, ...]) -> Any:
    """A DynamicCache that holds key, value, key, value, ... of the layers in order."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(len(flat) // 2):
        cache.update(flat[2 * layer], flat[2 * layer + 1], layer)
    return cache


def flat_cache(cache: Any) -> tuple[Any, ...]:
    """Key, value, key, value, ... of a cache's layers in order."""
    return tuple(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def cache_shape(model: Any) -> tuple[int, int, int]:
    """(layers, kv_heads, head_dim) as the model itself fills a cache; StageError when that is not one shape."""
    import torch
    from transformers import DynamicCache

    with torch.no_grad():
        result = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True)
    cache = getattr(result, "past_key_values", None)
    tensors = flat_cache(cache) if isinstance(cache, DynamicCache) and all(map(_plain, cache.layers)) else ()
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) != 1:
        found = f"shapes {sorted(shapes)}" if shapes else f"a {type(result).__name__}"
        raise StageError(
            f"model_type '{model.config.model_type}' keeps a state that is not keys and values of one shape per layer "
            f"({found}), which a decoder's graph cannot carry",
            hint="recurrent, linear-attention and latent-attention models are not supported by this exporter",
        )
    ((_, kv_heads, _, head_dim),) = shapes
    return len(tensors) // 2, kv_heads, head_dim


def _plain(layer: Any) -> bool:
    return getattr(layer, "keys", None) is not None and getattr(layer, "values", None) is not None


def _module(model: Any) -> Any:
    import torch

    takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    class Decoder(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, *past: Any) -> tuple[Any, ...]:
            given = {}
            if takes_positions:
                counted = (attention_mask.cumsum(1) - 1).clamp(min=0)
                given["position_ids"] = counted[:, past[0].shape[2] :]
            result = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=filled_cache(past),
                use_cache=True,
                **given,
            )
            return (result.logits, *flat_cache(result.past_key_values))

    return Decoder()
