"""Build the fused graph of a decoder: GroupQueryAttention with rotary embedding and cache, fused norms, [N, K] weights.

Padding may stand on either side of a prompt, and a batch may mix lengths. GroupQueryAttention wants a row's tokens at
its start, so each row of new tokens is rolled until its first real token is first, and the hidden states are rolled
back before the head; the cache keeps only real tokens, packed from position 0. Decoding (one token) pays for this with
a dozen nodes on single integers. Where a mask has holes inside a prompt, the result is undefined.

Legend: B batch, S new tokens, T past and new tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.stages.checkpoint import Checkpoint
from pipeline.stages.decoder_left import refuse_left_over
from pipeline.stages.onnx.families import Decoder, Rope
from pipeline.stages.onnx.graph import MICROSOFT, OPSET, Graph
from pipeline.stages.onnx.rope import rope_tables

TABLES = ("cos_cache", "sin_cache")
"""Beginnings of the names of computed tables, which are no weights."""
_INT64_MAX = 2**63 - 1


def build_decoder(decoder: Decoder, checkpoint: Checkpoint, positions: int) -> Graph:
    """The graph, with weights as references into the checkpoint's files, for contexts of up to `positions` tokens.

    Inputs: input_ids [B, S], attention_mask [B, T], past_key_values.{i}.key|value [B, kv_heads, P, head_dim].
    Outputs: logits [B, S, V] fp32, present.{i}.key|value. StageError when a tensor is missing or of a wrong shape,
    UnavailableError when the checkpoint holds tensors that this graph would leave out.
    """
    return DecoderBuilder(decoder, checkpoint, positions).build()


class DecoderBuilder:
    """What the decoders of all families share. A runtime with other operators overrides the methods that name them."""

    opset = OPSET

    def __init__(self, decoder: Decoder, checkpoint: Checkpoint, positions: int) -> None:
        self.d = decoder
        self.checkpoint = checkpoint
        self.positions = positions
        self.g = Graph(decoder.family, self.opset)
        self.used: set[str] = set()
        self.tables: dict[Rope, tuple[str, str]] = {}

    def build(self) -> Graph:
        """The finished graph."""
        d, g = self.d, self.g
        g.output("logits", "float32", ["batch", "sequence", d.vocab])
        self._start()
        embedding = self._weight("model.embed_tokens.weight", {"vocab_size": d.vocab, "hidden_size": d.hidden})
        hidden = g.node("Gather", [embedding, self.ids], "model.embed_tokens")
        if d.embed_scale != 1:
            scale = g.constant(d.embed_scale, "float32")
            hidden = g.node("Mul", [hidden, scale], "model.embed_tokens.scaled")
        skip = ""
        for layer in range(d.layers):
            hidden, skip = self._layer(layer, hidden, skip)
        hidden, _ = self._norm("model.norm", hidden, skip)
        hidden = self._end(hidden)
        if not d.tied:
            embedding = self._weight("lm_head.weight", {"vocab_size": d.vocab, "hidden_size": d.hidden})
        else:
            self.used.add("lm_head.weight")
        raw = [] if d.logit_softcap else ["logits"]
        logits = self._product("lm_head", hidden, embedding, raw)
        if d.logit_softcap:
            cap = g.constant(d.logit_softcap, "float32")
            small = g.node("Tanh", [g.node("Div", [logits, cap], "logits.scaled")], "logits.tanh")
            g.node("Mul", [small, cap], "logits.capped", outputs=["logits"])
        refuse_left_over(self.checkpoint, self.used, d)
        return g

    def _start(self) -> None:
        """input_ids rolled to the left, and what GroupQueryAttention wants to know of lengths."""
        g = self.g
        g.input("input_ids", "int64", ["batch", "sequence"])
        g.input("attention_mask", "int64", ["batch", "total_sequence"])
        one = g.constant(1)
        size = g.node("Shape", ["input_ids"], "padding.new", start=1, end=2)
        size = g.node("Squeeze", [size], "padding.new_scalar")
        total = g.node(
            "Squeeze", [g.node("Shape", ["attention_mask"], "padding.total", start=1)], "padding.total_scalar"
        )
        real = g.node("ReduceSum", ["attention_mask", g.constant([1])], "padding.real", keepdims=0)
        last = g.node("Max", [g.node("Sub", [real, one], "padding.last"), g.constant(0)], "padding.last_index")
        self.seqlens = g.node("Cast", [last], "padding.seqlens_k", to=6)
        self.total = g.node("Cast", [total], "padding.total_sequence_length", to=6)
        start = g.node("Unsqueeze", [g.node("Neg", [size], "padding.minus_new"), g.constant([0])], "padding.first_new")
        ends = [g.constant([_INT64_MAX]), g.constant([1])]
        fresh = g.node("Slice", ["attention_mask", start, *ends], "padding.new_mask")
        first = g.node("ArgMax", [fresh], "padding.first_real", axis=1, keepdims=1)
        steps = g.node("Range", [g.constant(0), size, one], "padding.steps")
        order = g.node("Mod", [g.node("Add", [steps, first], "padding.from"), size], "padding.order")
        self.undo = g.node("Mod", [g.node("Sub", [steps, first], "padding.back"), size], "padding.undo")
        self.ids = g.node("GatherElements", ["input_ids", order], "padding.rolled", axis=1)

    def _end(self, hidden: str) -> str:
        """The hidden states rolled back to where their tokens were."""
        back = self.g.node("Unsqueeze", [self.undo, self.g.constant([-1])], "padding.undo_3d")
        return self.g.node("GatherND", [hidden, back], "padding.rolled_back", batch_dims=1)

    def _layer(self, index: int, hidden: str, skip: str) -> tuple[str, str]:
        d, name = self.d, f"model.layers.{index}"
        normed, residual = self._norm(f"{name}.input_layernorm", hidden, skip)
        attended = self._attention(index, normed)
        if d.sandwich:
            attended, _ = self._norm(f"{name}.post_attention_layernorm", attended)
            normed, residual = self._norm(f"{name}.pre_feedforward_layernorm", attended, residual)
            output, _ = self._norm(f"{name}.post_feedforward_layernorm", self._mlp(f"{name}.mlp", normed))
        else:
            normed, residual = self._norm(f"{name}.post_attention_layernorm", attended, residual)
            output = self._mlp(f"{name}.mlp", normed)
        return output, residual

    def _norm(self, name: str, hidden: str, skip: str = "") -> tuple[str, str]:
        """(RMS norm of hidden + skip, hidden + skip)."""
        weight = self._norm_weight(f"{name}.weight", self.d.hidden)
        if not skip:
            normed = self.g.node("RMSNormalization", [hidden, weight], name, epsilon=self.d.epsilon, axis=-1)
            return normed, hidden
        outputs = [f"{name}.out", "", "", f"{name}.sum"]
        op = "SkipSimplifiedLayerNormalization"
        inputs = [hidden, skip, weight]
        self.g.node(op, inputs, name, outputs=outputs, domain=MICROSOFT, epsilon=self.d.epsilon)
        return outputs[0], outputs[3]

    def _norm_weight(self, name: str, size: int) -> str:
        if not self.d.norm_offset:
            return self._weight(name, {"size": size})
        self.used.add(name)
        values = self.checkpoint.take(name, (size,)).numpy() + np.float32(self.d.norm_offset)
        return self.g.table(f"{name}.offset", values)

    def _attention(self, index: int, hidden: str) -> str:
        d, g, name = self.d, self.g, f"model.layers.{index}.self_attn"
        q, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
        because = {"heads * head_dim": q, "hidden_size": d.hidden}
        if d.packed:
            packed = {"(heads + 2 * kv_heads) * head_dim": q + 2 * kv, "hidden_size": d.hidden}
            projected = [self._linear(f"{name}.qkv_proj", hidden, packed, d.qkv_bias), "", ""]
        else:
            narrow = {"kv_heads * head_dim": kv, "hidden_size": d.hidden}
            projected = [
                self._linear(f"{name}.q_proj", hidden, because, d.qkv_bias),
                self._linear(f"{name}.k_proj", hidden, narrow, d.qkv_bias),
                self._linear(f"{name}.v_proj", hidden, narrow, d.qkv_bias),
            ]
            if d.qk_norm:
                projected[0] = self._head_norm(f"{name}.q_norm", projected[0])
                projected[1] = self._head_norm(f"{name}.k_norm", projected[1])
        past = [f"past_key_values.{index}.key", f"past_key_values.{index}.value"]
        present = [f"present.{index}.key", f"present.{index}.value"]
        for inside, outside in zip(past, present, strict=True):
            g.input(inside, "float32", ["batch", d.kv_heads, "past_sequence", d.head_dim])
            g.output(outside, "float32", ["batch", d.kv_heads, "total_sequence", d.head_dim])
        cos, sin = self._tables(d.ropes[index])
        attributes: dict[str, float] = {"scale": d.attention_scale}
        if d.attention_softcap:
            attributes["softcap"] = d.attention_softcap
        if d.windows[index]:
            attributes["local_window_size"] = d.windows[index]
        attended = g.node(
            "GroupQueryAttention",
            [*projected, *past, self.seqlens, self.total, cos, sin],
            name,
            outputs=[f"{name}.out", *present],
            domain=MICROSOFT,
            num_heads=d.heads,
            kv_num_heads=d.kv_heads,
            do_rotary=1,
            **attributes,
        )
        return self._linear(f"{name}.o_proj", attended, {"hidden_size": d.hidden, "heads * head_dim": q}, d.out_bias)

    def _head_norm(self, name: str, projected: str) -> str:
        g = self.g
        shape = g.constant([0, 0, -1, self.d.head_dim])
        heads = g.node("Reshape", [projected, shape], f"{name}.heads")
        weight = self._norm_weight(f"{name}.weight", self.d.head_dim)
        normed = g.node("RMSNormalization", [heads, weight], name, epsilon=self.d.epsilon, axis=-1)
        return g.node("Reshape", [normed, g.constant([0, 0, -1])], f"{name}.flat")

    def _tables(self, rope: Rope) -> tuple[str, str]:
        if rope not in self.tables:
            suffix = f".{len(self.tables)}" if self.tables else ""
            cos, sin = rope_tables(rope, self.positions)
            names = f"{TABLES[0]}{suffix}", f"{TABLES[1]}{suffix}"
            self.tables[rope] = self.g.table(names[0], cos), self.g.table(names[1], sin)
        return self.tables[rope]

    def _mlp(self, name: str, hidden: str) -> str:
        d, g = self.d, self.g
        wide = {"intermediate_size": d.intermediate, "hidden_size": d.hidden}
        if d.packed:
            double = {"2 * intermediate_size": 2 * d.intermediate, "hidden_size": d.hidden}
            both = self._linear(f"{name}.gate_up_proj", hidden, double, d.mlp_bias)
            gate, up = f"{name}.gate", f"{name}.up"
            g.node("Split", [both], f"{name}.split", outputs=[gate, up], axis=-1, num_outputs=2)
        else:
            gate = self._linear(f"{name}.gate_proj", hidden, wide, d.mlp_bias)
            up = self._linear(f"{name}.up_proj", hidden, wide, d.mlp_bias)
        product = g.node("Mul", [self._activation(f"{name}.act_fn", gate), up], f"{name}.gated")
        back = {"hidden_size": d.hidden, "intermediate_size": d.intermediate}
        return self._linear(f"{name}.down_proj", product, back, d.mlp_bias)

    def _activation(self, name: str, hidden: str) -> str:
        g, kind = self.g, self.d.activation
        if kind == "silu":
            return g.node("QuickGelu", [hidden], name, domain=MICROSOFT, alpha=1.0)
        if kind == "relu":
            return g.node("Relu", [hidden], name)
        return g.node("Gelu", [hidden], name, approximate="none" if kind == "gelu" else "tanh")

    def _linear(self, name: str, hidden: str, shape: Mapping[str, int], bias: bool) -> str:
        weight = self._weight(f"{name}.weight", shape)
        product = self._product(name, hidden, weight)
        if not bias:
            return product
        size = next(iter(shape.items()))
        return self.g.node("Add", [product, self._weight(f"{name}.bias", dict([size]))], f"{name}.biased")

    def _product(self, name: str, hidden: str, weight: str, outputs: Sequence[str] = ()) -> str:
        """`hidden` times a weight that is stored [N, K]."""
        return self.g.node("FusedMatMul", [hidden, weight], name, outputs=outputs, domain=MICROSOFT, transB=1)

    def _weight(self, name: str, shape: Mapping[str, int]) -> str:
        self.used.add(name)
        because = ", ".join(f"{key} is {value}" for key, value in shape.items())
        return self.g.weight(self.checkpoint.take(name, tuple(shape.values()), because))
