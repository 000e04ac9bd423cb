"""Encoder-decoders for text and speech as two flat modules: the encoder makes the cross-attention's keys and values.

Both call the whole model, so no architecture's layers are named here: the encoder's graph runs the decoder on one token
and keeps only what fills the cross-attention cache; everything else of that call is dead code that the exporter drops.

Legend: B batch, E encoder positions, S new tokens, P tokens in the cache, K heads, D head size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from pipeline.frozen import frozen
from pipeline.stages.onnx.torch_decoder import (
    CACHE_AXES,
    cache_outputs,
    cache_ports,
    filled_cache,
    flat_cache,
)
from pipeline.stages.onnx.torch_export import Port, export_module

_PRESENT_AXES = ("batch", None, "total_sequence", None)


@frozen
class Seq2seqGraphs:
    """Two onnx_ir models, and the cache's shape per layer."""

    encoder: Any
    decoder: Any
    layers: int
    kv_heads: int
    head_dim: int


def export_seq2seq(model: Any, opset: int) -> Seq2seqGraphs:
    """The graphs of an encoder-decoder.

    encoder: input_ids, attention_mask [B, E] int64 or input_features [B, mels, frames] -> encoder_hidden_states
    [B, E, H], cross_key_values.{i}.key|value [B, K, E, D]. decoder: input_ids [B, S], encoder_attention_mask [B, E]
    (text only), past_key_values.{i}.* [B, K, P, D], cross_key_values.{i}.* -> logits [B, S, V], present.{i}.*
    [B, K, P + S, D].
    """
    import torch

    sources = _sources(model)
    speech = sources[0].name == "input_features"
    encoder = _encoder(model, speech)
    with torch.no_grad():
        example = encoder(*(port.example for port in sources))
    hidden, cross = example[0], example[1:]
    layers = len(cross) // 2
    batch, kv_heads, positions, head_dim = cross[0].shape
    axis = None if speech else "encoder_sequence"
    cross_axes = ("batch", None, axis, None)
    graph = export_module(
        encoder,
        sources,
        {"encoder_hidden_states": ("batch", axis, None), **cache_outputs(layers, cross_axes, "cross_key_values")},
        opset,
    )
    ports = [Port("input_ids", torch.ones(batch, 4, dtype=torch.int64), ("batch", "sequence"))]
    if not speech:
        ports.append(Port("encoder_attention_mask", sources[1].example, ("batch", axis)))
    ports += cache_ports("past_key_values", layers, (batch, kv_heads, 5, head_dim), CACHE_AXES)
    ports += cache_ports("cross_key_values", layers, (batch, kv_heads, positions, head_dim), cross_axes)
    decoder = export_module(
        _decoder(model, speech, layers, hidden.shape[-1]),
        ports,
        {"logits": ("batch", "sequence", None), **cache_outputs(layers, _PRESENT_AXES)},
        opset,
    )
    return Seq2seqGraphs(graph, decoder, layers, kv_heads, head_dim)


def _sources(model: Any) -> list[Port]:
    import torch

    if model.main_input_name == "input_features":
        # Two frames of the log-mel spectrogram make one position.
        shape = (3, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return [Port("input_features", torch.zeros(shape), ("batch", None, None))]
    ids = torch.arange(21).remainder(int(model.config.vocab_size)).reshape(3, 7)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    axes = ("batch", "encoder_sequence")
    return [Port("input_ids", ids, axes), Port("attention_mask", mask, axes)]


def _encoder(model: Any, speech: bool) -> Any:
    import torch
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    class Encoder(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, source: Any, *mask: Any) -> tuple[Any, ...]:
            masks = {} if speech else {"attention_mask": mask[0]}
            hidden = self.model.get_encoder()(source, **masks).last_hidden_state
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            result = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
                decoder_input_ids=torch.zeros(hidden.shape[0], 1, dtype=torch.int64),
                past_key_values=cache,
                use_cache=True,
                **masks,
            )
            return (hidden, *flat_cache(result.past_key_values.cross_attention_cache))

    return Encoder()


def _decoder(model: Any, speech: bool, layers: int, hidden_size: int) -> Any:
    import torch
    from transformers import EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    class Decoder(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, *rest: Any) -> tuple[Any, ...]:
            masks = {} if speech else {"attention_mask": rest[0]}
            flat = rest if speech else rest[1:]
            past, cross = flat[: 2 * layers], flat[2 * layers :]
            cache = EncoderDecoderCache(filled_cache(past), filled_cache(cross))
            cache.is_updated = dict.fromkeys(range(layers), True)  # cross keys and values are final
            result = self.model(
                # Only its shape is read: the cache holds what is made of it.
                encoder_outputs=BaseModelOutput(last_hidden_state=cross[0].new_zeros(*_hidden_shape(cross[0]))),
                decoder_input_ids=input_ids,
                past_key_values=cache,
                use_cache=True,
                **masks,
            )
            return (result.logits, *flat_cache(result.past_key_values.self_attention_cache))

    def _hidden_shape(key: Any) -> tuple[Any, Any, int]:
        return key.shape[0], key.shape[2], hidden_size

    return Decoder()
