"""Build a decoder's graph with a static KV cache, in ONNX operators that TensorRT imports: opset 24.

The cache is a buffer of fixed length that comes in and goes out: TensorScatter writes the new keys and values at each
row's own place, Attention reads the whole of it under a mask, and TensorRT lets input and output share their memory.
Each row's tokens lie packed from place 0; `write_indices` says where its new ones begin. So no padding enters the
graph: what a row holds beyond its length is never seen, and is overwritten by the tokens that come next.

Legend: B batch, S new tokens, C length of the cache, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import UnavailableError
from pipeline.stages.checkpoint import Checkpoint
from pipeline.stages.onnx.decoder import DecoderBuilder
from pipeline.stages.onnx.families import Decoder
from pipeline.stages.onnx.graph import Graph

OPSET = 24


def check(decoder: Decoder) -> None:
    """Refuse what TensorRT's Attention cannot compute. Raises UnavailableError."""
    if decoder.attention_softcap:
        raise UnavailableError(
            f"TensorRT has no attention with a soft cap, which a {decoder.family} model uses "
            f"(attn_logit_softcapping {decoder.attention_softcap:g} in config.json, in every layer's self_attn)",
            hint="use `runtime: onnxruntime`, whose attention has it",
        )


def build_static_decoder(decoder: Decoder, checkpoint: Checkpoint, length: int) -> Graph:
    """The graph, with weights as references into the checkpoint's files, for a cache of `length` tokens.

    Inputs: input_ids [B, S] and write_indices [B] int64, past_key_values.{i}.key|value [B, kv_heads, C, head_dim].
    Outputs: logits [B, S, V] fp32, present.{i}.key|value, of the same shape as the past. Errors as of `build_decoder`.
    """
    check(decoder)
    return _Static(decoder, checkpoint, length).build()


class _Static(DecoderBuilder):
    opset = OPSET

    def _start(self) -> None:
        """Places of the new tokens, and which places of the cache each of them sees."""
        g = self.g
        self.ids = g.input("input_ids", "int64", ["batch", "sequence"])
        g.input("write_indices", "int64", ["batch"])
        size = g.node("Squeeze", [g.node("Shape", ["input_ids"], "places.new", start=1, end=2)], "places.count")
        steps = g.node("Range", [g.constant(0), size, g.constant(1)], "places.steps")
        first = g.node("Unsqueeze", ["write_indices", g.constant([1])], "places.first")
        self.places = g.node("Add", [first, steps], "places")
        self.rows = g.node("Unsqueeze", [self.places, g.constant([1, 3])], "places.rows")
        self.columns = g.constant(range(self.positions))
        self.masks: dict[int, str] = {}

    def _end(self, hidden: str) -> str:
        return hidden

    def _mask(self, window: int) -> str:
        """[B, 1, S, C]: the token's own place and those before it, within the window if there is one."""
        if window not in self.masks:
            g = self.g
            mask = g.node("LessOrEqual", [self.columns, self.rows], "mask")
            if window:
                oldest = g.node("Sub", [self.rows, g.constant(window)], f"mask.{window}.before")
                near = g.node("Greater", [self.columns, oldest], f"mask.{window}.near")
                mask = g.node("And", [mask, near], f"mask.{window}")
            self.masks[window] = mask
        return self.masks[window]

    def _norm(self, name: str, hidden: str, skip: str = "") -> tuple[str, str]:
        if skip:
            hidden = self.g.node("Add", [hidden, skip], f"{name}.sum")
        weight = self._norm_weight(f"{name}.weight", self.d.hidden)
        return self.g.node("RMSNormalization", [hidden, weight], name, epsilon=self.d.epsilon, axis=-1), hidden

    def _attention(self, index: int, hidden: str) -> str:
        d, g, name = self.d, self.g, f"model.layers.{index}.self_attn"
        q, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
        wide, narrow = {"heads * head_dim": q}, {"kv_heads * head_dim": kv}
        size = {"hidden_size": d.hidden}
        if d.packed:
            both = {"(heads + 2 * kv_heads) * head_dim": q + 2 * kv, **size}
            projected = self._linear(f"{name}.qkv_proj", hidden, both, d.qkv_bias)
            query, key, value = (f"{name}.{part}" for part in ("query", "key", "value"))
            parts = [projected, g.constant([q, kv, kv])]
            g.node("Split", parts, f"{name}.split", outputs=[query, key, value], axis=-1)
        else:
            query = self._linear(f"{name}.q_proj", hidden, wide | size, d.qkv_bias)
            key = self._linear(f"{name}.k_proj", hidden, narrow | size, d.qkv_bias)
            value = self._linear(f"{name}.v_proj", hidden, narrow | size, d.qkv_bias)
        if d.qk_norm:
            query, key = self._head_norm(f"{name}.q_norm", query), self._head_norm(f"{name}.k_norm", key)
        query = self._turned(f"{name}.query", self._heads(f"{name}.query", query, d.heads), index)
        key = self._turned(f"{name}.key", self._heads(f"{name}.key", key, d.kv_heads), index)
        cached = [
            self._cached(index, "key", key),
            self._cached(index, "value", self._heads(f"{name}.value", value, d.kv_heads)),
        ]
        inputs = [query, *cached, self._mask(d.windows[index])]
        attended = g.node("Attention", inputs, name, scale=d.attention_scale)
        flat = g.node("Transpose", [attended], f"{name}.tokens", perm=[0, 2, 1, 3])
        flat = g.node("Reshape", [flat, g.constant([0, 0, q])], f"{name}.flat")
        return self._linear(f"{name}.o_proj", flat, size | wide, d.out_bias)

    def _heads(self, name: str, projected: str, heads: int) -> str:
        """[B, S, heads * head_dim] -> [B, heads, S, head_dim]."""
        shape = self.g.constant([0, 0, heads, self.d.head_dim])
        split = self.g.node("Reshape", [projected, shape], f"{name}.split")
        return self.g.node("Transpose", [split], f"{name}.heads", perm=[0, 2, 1, 3])

    def _turned(self, name: str, heads: str, index: int) -> str:
        rope = self.d.ropes[index]
        cos, sin = self._tables(rope)
        dims = rope.dims if rope.dims != self.d.head_dim else 0  # 0: all
        inputs = [heads, cos, sin, self.places]
        return self.g.node("RotaryEmbedding", inputs, f"{name}.turned", rotary_embedding_dim=dims)

    def _cached(self, index: int, part: str, fresh: str) -> str:
        d, g = self.d, self.g
        past, present = f"past_key_values.{index}.{part}", f"present.{index}.{part}"
        shape: list[int | str] = ["batch", d.kv_heads, self.positions, d.head_dim]
        g.input(past, "float32", shape)
        g.output(present, "float32", shape)
        name = f"model.layers.{index}.self_attn.{part}.cache"
        return g.node("TensorScatter", [past, fresh, "write_indices"], name, outputs=[present], axis=2, mode="linear")

    def _activation(self, name: str, hidden: str) -> str:
        g, kind = self.g, self.d.activation
        if kind == "silu":
            return g.node("Mul", [hidden, g.node("Sigmoid", [hidden], f"{name}.gate")], name)
        if kind == "relu":
            return g.node("Relu", [hidden], name)
        return g.node("Gelu", [hidden], name, approximate="none" if kind == "gelu" else "tanh")

    def _product(self, name: str, hidden: str, weight: str, outputs: Sequence[str] = ()) -> str:
        turned = self.g.node("Transpose", [weight], f"{name}.turned", perm=[1, 0])
        return self.g.node("MatMul", [hidden, turned], name, outputs=outputs)
