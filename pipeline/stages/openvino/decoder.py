"""Build the stateful OpenVINO model of a decoder from the facts of its family, without torch and without a weight.

The cache is state inside the model (ReadValue, Assign), re-ordered by the input `beam_idx`, as OpenVINO GenAI and Model
Server expect. The shapes of the subgraphs (RMS norm, rotary embedding, attention) are those that OpenVINO's plugins
fuse. Padding may stand on either side of a row: what the mask hides, nobody sees.

Legend: B batch, S new tokens, T past and new tokens, H hidden, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pipeline.stages.checkpoint import Checkpoint, Tensor
from pipeline.stages.decoder_left import refuse_left_over
from pipeline.stages.onnx.families import Decoder, Rope
from pipeline.stages.onnx.rope import inverse_frequencies

Place = Callable[[str, Tensor], Any]
"""(role, tensor) -> node of the weight as fp32. Roles: `embedding`, `head`, `linear`."""
HIDDEN = -65504.0
"""Added to the score of what the mask hides: fp16's lowest number, which is finite in every execution precision. A row
of padding that saw minus infinity everywhere would be NaN, and NaN times a weight of 0 is NaN."""


def build_decoder(decoder: Decoder, checkpoint: Checkpoint, place: Place) -> Any:
    """The ov.Model. Its weights are what `place` gives; norms, biases and tables are in memory.

    Inputs: input_ids [B, S], attention_mask [B, T], position_ids [B, S] int64, beam_idx [B] int32. Output: logits
    [B, S, V] float32. StageError when a tensor is missing or of a wrong shape, UnavailableError when the checkpoint
    holds tensors that this model would leave out.
    """
    return _Builder(decoder, checkpoint, place).build()


class _Builder:
    def __init__(self, decoder: Decoder, checkpoint: Checkpoint, place: Place) -> None:
        import openvino as ov
        from openvino import opset15

        self.ov = ov
        self.op: Any = opset15
        self.d = decoder
        self.checkpoint = checkpoint
        self.place = place
        self.used: set[str] = set()
        self.sinks: list[Any] = []
        self.masks: dict[int, Any] = {}
        self.ropes: dict[Rope, tuple[Any, Any]] = {}

    def build(self) -> Any:
        d, op, ov = self.d, self.op, self.ov
        self.ids = self._parameter("input_ids", [-1, -1], ov.Type.i64)
        self.mask = self._parameter("attention_mask", [-1, -1], ov.Type.i64)
        self.positions = self._parameter("position_ids", [-1, -1], ov.Type.i64)
        self.beams = self._parameter("beam_idx", [-1], ov.Type.i32)
        self.batch = op.gather(op.shape_of(self.ids), self._ints([0]), self._ints(0))
        table = self._weight("embedding", "model.embed_tokens.weight", {"vocab_size": d.vocab, "hidden_size": d.hidden})
        hidden = op.gather(table, op.convert(self.ids, "i32"), self._ints(0), name="model.embed_tokens")
        if d.embed_scale != 1:
            hidden = op.multiply(hidden, self._floats(d.embed_scale), name="model.embed_tokens.scaled")
        for layer in range(d.layers):
            hidden = self._layer(layer, hidden)
        hidden = self._norm("model.norm", hidden, d.hidden)
        if d.tied:
            self.used.add("lm_head.weight")
            name = "model.embed_tokens.weight"
        else:
            name = "lm_head.weight"
        head = self._weight("head", name, {"vocab_size": d.vocab, "hidden_size": d.hidden})
        logits = op.matmul(hidden, head, False, True, name="lm_head")
        if d.logit_softcap:
            logits = self._capped(logits, d.logit_softcap)
        refuse_left_over(self.checkpoint, self.used, d)
        result = op.result(logits, name="logits")
        result.input(0).get_source_output().get_tensor().set_names({"logits"})
        inputs = [self.ids, self.mask, self.positions, self.beams]
        return ov.Model(results=[result], sinks=self.sinks, parameters=inputs, name=d.family)

    def _parameter(self, name: str, shape: list[int], kind: Any) -> Any:
        node = self.op.parameter(shape, kind, name=name)
        node.output(0).get_tensor().set_names({name})
        return node

    def _ints(self, values: Any, kind: str = "int64") -> Any:
        return self.op.constant(np.asarray(values, kind))

    def _floats(self, values: Any) -> Any:
        return self.op.constant(np.asarray(values, np.float32))

    def _layer(self, index: int, hidden: Any) -> Any:
        d, op, name = self.d, self.op, f"model.layers.{index}"
        attended = self._attention(index, self._norm(f"{name}.input_layernorm", hidden, d.hidden))
        if d.sandwich:
            attended = self._norm(f"{name}.post_attention_layernorm", attended, d.hidden)
        hidden = op.add(hidden, attended, name=f"{name}.attended")
        before = "pre_feedforward_layernorm" if d.sandwich else "post_attention_layernorm"
        output = self._mlp(f"{name}.mlp", self._norm(f"{name}.{before}", hidden, d.hidden))
        if d.sandwich:
            output = self._norm(f"{name}.post_feedforward_layernorm", output, d.hidden)
        return op.add(hidden, output, name=f"{name}.out")

    def _norm(self, name: str, hidden: Any, size: int) -> Any:
        op = self.op
        weight = self._values(f"{name}.weight", {"size": size}) + np.float32(self.d.norm_offset)
        mean = op.reduce_mean(op.power(hidden, self._floats(2.0)), self._ints([-1]), keep_dims=True)
        root = op.sqrt(op.add(mean, self._floats(self.d.epsilon)))
        normed = op.multiply(hidden, op.divide(self._floats(1.0), root))
        return op.multiply(normed, self._floats(weight), name=name)

    def _attention(self, index: int, hidden: Any) -> Any:
        d, op, name = self.d, self.op, f"model.layers.{index}.self_attn"
        q, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
        if d.packed:
            packed = {"(heads + 2 * kv_heads) * head_dim": q + 2 * kv, "hidden_size": d.hidden}
            both = self._linear(f"{name}.qkv_proj", hidden, packed, d.qkv_bias)
            projected = op.variadic_split(both, self._ints(-1), self._ints([q, kv, kv])).outputs()
        else:
            wide = {"heads * head_dim": q, "hidden_size": d.hidden}
            narrow = {"kv_heads * head_dim": kv, "hidden_size": d.hidden}
            shapes = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow}
            projected = [self._linear(f"{name}.{part}", hidden, shapes[part], d.qkv_bias) for part in shapes]
        query, key, value = (
            self._heads(each, heads) for each, heads in zip(projected, (d.heads, d.kv_heads, d.kv_heads), strict=True)
        )
        if d.qk_norm:
            query = self._norm(f"{name}.q_norm", query, d.head_dim)
            key = self._norm(f"{name}.k_norm", key, d.head_dim)
        query, key, value = (op.transpose(each, self._ints([0, 2, 1, 3])) for each in (query, key, value))
        cos, sin = self._angles(d.ropes[index])
        query, key = (self._turned(each, cos, sin, d.ropes[index].dims) for each in (query, key))
        key = self._cached(f"{index}.key", key)
        value = self._cached(f"{index}.value", value)
        mask = self._hidden_places(d.windows[index])
        attended = self._attend(name, query, self._repeated(key), self._repeated(value), mask)
        flat = op.reshape(op.transpose(attended, self._ints([0, 2, 1, 3])), self._ints([0, 0, q]), True)
        return self._linear(f"{name}.o_proj", flat, {"hidden_size": d.hidden, "heads * head_dim": q}, d.out_bias)

    def _heads(self, projected: Any, heads: int) -> Any:
        """[B, S, heads * D] -> [B, S, heads, D]"""
        return self.op.reshape(projected, self._ints([0, 0, heads, self.d.head_dim]), True)

    def _angles(self, rope: Rope) -> tuple[Any, Any]:
        """cos and sin [B, 1, S, dims] of the new tokens' positions."""
        if rope not in self.ropes:
            op = self.op
            inverse_R, factor = inverse_frequencies(rope)
            places = op.convert(op.unsqueeze(self.positions, self._ints(1)), "f32")
            table = self.op.constant(inverse_R.reshape(1, -1, 1))
            batch = op.concat([self.batch, self._ints([1]), self._ints([1])], 0)
            angles = op.matmul(op.broadcast(table, batch, broadcast_spec="BIDIRECTIONAL"), places, False, False)
            angles = op.transpose(angles, self._ints([0, 2, 1]))
            both = op.concat([angles, angles], -1)
            pair = [op.unsqueeze(turn(both), self._ints(1)) for turn in (op.cos, op.sin)]
            if factor != 1:
                pair = [op.multiply(each, self._floats(factor)) for each in pair]
            self.ropes[rope] = pair[0], pair[1]
        return self.ropes[rope]

    def _turned(self, heads: Any, cos: Any, sin: Any, dims: int) -> Any:
        """Rotary embedding of the first `dims` of every head [B, heads, S, D]."""
        op, rest = self.op, self.d.head_dim - dims
        kept = []
        if rest:
            parts = op.variadic_split(heads, self._ints(3), self._ints([dims, rest]))
            heads, kept = parts.output(0), [parts.output(1)]
        halves = op.variadic_split(heads, self._ints(3), self._ints([dims // 2, dims // 2]))  # axis 3: -1 is not fused
        swapped = op.concat([op.multiply(halves.output(1), self._floats(-1.0)), halves.output(0)], -1)
        turned = op.add(op.multiply(heads, cos), op.multiply(swapped, sin))
        return op.concat([turned, *kept], -1) if rest else turned

    def _cached(self, name: str, fresh: Any) -> Any:
        """The state with the new tokens behind it, [B, kv_heads, T, D]; its rows come in the order of `beam_idx`."""
        d, op, ov = self.d, self.op, self.ov
        variable = f"past_key_values.{name}present.{name}"
        empty = op.concat([self.batch, self._ints([d.kv_heads]), self._ints([0]), self._ints([d.head_dim])], 0)
        start = op.broadcast(self._floats(0.0), empty)
        shape = ov.PartialShape([-1, d.kv_heads, -1, d.head_dim])
        past = op.read_value(start, variable, ov.Type.f32, shape, name=f"past_key_values.{name}")
        past = op.gather(past, self.beams, self._ints(0))
        whole = op.concat([past, fresh], 2, name=f"present.{name}")
        self.sinks.append(op.assign(whole, variable, name=f"keep.{name}"))
        return whole

    def _repeated(self, cached: Any) -> Any:
        """[B, kv_heads, T, D] -> [B, heads, T, D]: every head of keys or values for its group of queries."""
        d, op = self.d, self.op
        if d.heads == d.kv_heads:
            return cached
        group = d.heads // d.kv_heads
        apart = op.unsqueeze(cached, self._ints(2))
        shape = op.shape_of(cached)
        outer = op.gather(shape, self._ints([0, 1]), self._ints(0))
        inner = op.gather(shape, self._ints([2, 3]), self._ints(0))
        wide = op.broadcast(apart, op.concat([outer, self._ints([group]), inner], 0), broadcast_spec="BIDIRECTIONAL")
        return op.reshape(wide, self._ints([0, d.heads, -1, d.head_dim]), True)

    def _hidden_places(self, window: int) -> Any:
        """[B, 1, S, T] float32: 0 where a new token sees, HIDDEN where not. A `window` of 0 sees all before it."""
        if window not in self.masks:
            op = self.op
            zero, one = self._ints(0), self._ints(1)
            total = op.gather(op.shape_of(self.mask), self._ints(1), zero)
            new = op.gather(op.shape_of(self.ids), self._ints(1), zero)
            places_T = op.range(zero, total, one, "i64")
            own_S = op.add(op.range(zero, new, one, "i64"), op.subtract(total, new))
            own_11S1 = op.unsqueeze(own_S, self._ints([0, 1, 3]))
            seen = op.less_equal(places_T, own_11S1)
            real = op.unsqueeze(op.not_equal(self.mask, zero), self._ints([1, 2]))
            visible, hidden = self._floats(0.0), self._floats(HIDDEN)
            if not window:
                self.masks[window] = op.select(op.logical_and(seen, real), visible, hidden)
                return self.masks[window]
            # By this shape OpenVINO's conversion to paged attention knows a window and its size. From any other it
            # drops the mask without a word, and GenAI's default would then see all tokens.
            near = op.greater(places_T, op.add(own_11S1, self._ints(-window)))
            near = op.bitwise_and(op.bitwise_and(seen, near), seen)
            near = op.bitwise_and(op.bitwise_and(seen, near), real)
            sizes = [self.batch, self._ints([1]), *(op.unsqueeze(size, zero) for size in (new, total))]
            masked = op.select(op.broadcast(near, op.concat(sizes, 0)), visible, hidden)
            ends = (op.unsqueeze(each, zero) for each in (zero, total, one))
            self.masks[window] = op.slice(masked, *ends, self._ints([3]))
        return self.masks[window]

    def _attend(self, name: str, query: Any, key: Any, value: Any, mask: Any) -> Any:
        d, op = self.d, self.op
        scale = self._floats(d.attention_scale)
        if not d.attention_softcap:
            return op.scaled_dot_product_attention(query, key, value, mask, scale, False, name=name)
        scores = op.multiply(op.matmul(query, key, False, True), scale)
        scores = op.add(self._capped(scores, d.attention_softcap), mask)
        return op.matmul(op.softmax(scores, -1), value, False, False, name=name)

    def _capped(self, values: Any, cap: float) -> Any:
        op = self.op
        return op.multiply(op.tanh(op.divide(values, self._floats(cap))), self._floats(cap))

    def _mlp(self, name: str, hidden: Any) -> Any:
        d, op = self.d, self.op
        wide = {"intermediate_size": d.intermediate, "hidden_size": d.hidden}
        if d.packed:
            double = {"2 * intermediate_size": 2 * d.intermediate, "hidden_size": d.hidden}
            both = self._linear(f"{name}.gate_up_proj", hidden, double, d.mlp_bias)
            gate, up = op.variadic_split(both, self._ints(-1), self._ints([d.intermediate, d.intermediate])).outputs()
        else:
            gate = self._linear(f"{name}.gate_proj", hidden, wide, d.mlp_bias)
            up = self._linear(f"{name}.up_proj", hidden, wide, d.mlp_bias)
        product = op.multiply(self._activation(gate), up, name=f"{name}.gated")
        back = {"hidden_size": d.hidden, "intermediate_size": d.intermediate}
        return self._linear(f"{name}.down_proj", product, back, d.mlp_bias)

    def _activation(self, hidden: Any) -> Any:
        op, kind = self.op, self.d.activation
        if kind == "silu":
            return op.swish(hidden)
        if kind == "relu":
            return op.relu(hidden)
        return op.gelu(hidden, "erf" if kind == "gelu" else "tanh")

    def _linear(self, name: str, hidden: Any, shape: Mapping[str, int], bias: bool) -> Any:
        weight = self._weight("linear", f"{name}.weight", shape)
        product = self.op.matmul(hidden, weight, False, True, name=name)
        if not bias:
            return product
        size = next(iter(shape.items()))
        return self.op.add(product, self._floats(self._values(f"{name}.bias", dict([size]))), name=f"{name}.biased")

    def _weight(self, role: str, name: str, shape: Mapping[str, int]) -> Any:
        return self.place(role, self._take(name, shape))

    def _values(self, name: str, shape: Mapping[str, int]) -> Any:
        return self._take(name, shape).numpy()

    def _take(self, name: str, shape: Mapping[str, int]) -> Tensor:
        self.used.add(name)
        because = ", ".join(f"{key} is {value}" for key, value in shape.items())
        return self.checkpoint.take(name, tuple(shape.values()), because)
