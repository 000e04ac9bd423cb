"""Toy graphs with the interfaces that exporters write, small enough that numpy answers the same from scratch.

One head, one layer: a token's key is its embedding plus its position's, its value is twice that, its query is its key.

Legend: B rows, S tokens fed, P in the cache, T = P + S, E of the encoder; D is 4, the vocabulary V is 16.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, parser

VOCAB, DIM, EOS, START = 16, 4, 2, 1
_rng = np.random.default_rng(0)
EMBED = _rng.normal(0, 1.5, (VOCAB, DIM)).astype(np.float32)
PLACE = _rng.normal(0, 0.7, (64, DIM)).astype(np.float32)
HEAD = _rng.normal(0, 1.5, (DIM, VOCAB)).astype(np.float32)

_ATTEND = """
  axis1 = Constant <value_ints = [1]> ()
  keys = Unsqueeze (x, axis1)
  two = CastLike (two_f, x)
  values = Mul (keys, two)
  present.0.key = Concat <axis = 2> (past_key_values.0.key, keys)
  present.0.value = Concat <axis = 2> (past_key_values.0.value, values)
  keysT = Transpose <perm = [0, 1, 3, 2]> (present.0.key)
  scores = MatMul (keys, keysT)
  allT = Shape <start = 2, end = 3> (present.0.key)
  pastP = Shape <start = 2, end = 3> (past_key_values.0.key)
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  t = Squeeze (allT)
  p = Squeeze (pastP)
  columns = Range (zero, t, one)
  rows = Range (p, t, one)
  rowsS = Unsqueeze (rows, axis1)
  causal = LessOrEqual (columns, rowsS)
"""


def _model(text: str, weights: dict[str, Any]) -> onnx.ModelProto:
    # The text form has no dots in names.
    model = parser.parse_model(re.sub(r"\.0\.(key|value)", r"_0_\1", text))

    def dotted(name: str) -> str:
        return re.sub(r"_0_(key|value)$", r".0.\1", name)

    for value in (*model.graph.input, *model.graph.output):
        value.name = dotted(value.name)
    for node in model.graph.node:
        node.input[:] = [dotted(name) for name in node.input]
        node.output[:] = [dotted(name) for name in node.output]
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items())
    onnx.checker.check_model(model, full_check=True)
    return model


def decoder(folder: Path, dtype: str = "float", context: int = 40) -> Path:
    """A text-generation engine with `cache: concat` and position_ids."""
    text = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    toy (int64[B, S] input_ids, int64[B, T] attention_mask, int64[B, S] position_ids,
         {dtype}[B, 1, P, {DIM}] past_key_values.0.key, {dtype}[B, 1, P, {DIM}] past_key_values.0.value)
      => ({dtype}[B, S, {VOCAB}] logits, {dtype}[B, 1, T, {DIM}] present.0.key, {dtype}[B, 1, T, {DIM}] present.0.value)
    {{
      words = Gather (embed, input_ids)
      places = Gather (place, position_ids)
      x = Add (words, places)
      {_ATTEND}
      axes12 = Constant <value_ints = [1, 2]> ()
      no = Constant <value_int = 0> ()
      there0 = Equal (attention_mask, no)
      there1 = Not (there0)
      there = Unsqueeze (there1, axes12)
      seen = And (there, causal)
      low = CastLike (low_f, scores)
      masked = Where (seen, scores, low)
      weights = Softmax <axis = -1> (masked)
      context = MatMul (weights, present.0.value)
      flat = Squeeze (context, axis1)
      logits = MatMul (flat, head)
    }}"""
    kind = np.float16 if dtype == "float16" else np.float32
    weights = {"embed": EMBED.astype(kind), "place": PLACE.astype(kind), "head": HEAD.astype(kind)}
    weights |= {"two_f": np.float32(2), "low_f": np.float32(-6e4)}
    onnx.save(_model(text, weights), folder / "model.onnx")
    return _engine(folder, "decoder", {"model": "model.onnx"}, context)


def decoder_logits(ids: list[int]) -> np.ndarray:
    """[T, V] of a sequence, without a cache."""
    x = (EMBED[ids] + PLACE[: len(ids)]).astype(np.float64)
    return _attention(x, x, np.tril(np.ones((len(ids), len(ids)), bool))) @ HEAD


def seq2seq(folder: Path, speech: bool = False) -> Path:
    """An encoder-decoder: of token ids with a mask, or of `input_features` [B, D, E] without one."""
    given = f"float[B, {DIM}, E] input_features" if speech else "int64[B, E] input_ids, int64[B, E] attention_mask"
    hidden = "Transpose <perm = [0, 2, 1]> (input_features)" if speech else "Gather (embed, input_ids)"
    # The mask goes through the encoder too, as it does in a real one: padded places must not be used by the decoder.
    encoder = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    toy ({given}) => (float[B, E, {DIM}] encoder_hidden_states,
      float[B, 1, E, {DIM}] cross_key_values.0.key, float[B, 1, E, {DIM}] cross_key_values.0.value)
    {{
      encoder_hidden_states = {hidden}
      axis1 = Constant <value_ints = [1]> ()
      cross_key_values.0.key = Unsqueeze (encoder_hidden_states, axis1)
      {"" if speech else "mask_f = CastLike (attention_mask, encoder_hidden_states)"}
      {"" if speech else "axes13 = Constant <value_ints = [1, 3]> ()"}
      {"" if speech else "mask4 = Unsqueeze (mask_f, axes13)"}
      tripled = Mul (cross_key_values.0.key, three)
      cross_key_values.0.value = {"Identity (tripled)" if speech else "Mul (tripled, mask4)"}
    }}"""
    mask = "" if speech else "int64[B, E] encoder_attention_mask,"
    cross = (
        "there = Identity (crossed)"
        if speech
        else """no = Constant <value_int = 0> ()
      axes12 = Constant <value_ints = [1, 2]> ()
      padded = Equal (encoder_attention_mask, no)
      padded4 = Unsqueeze (padded, axes12)
      there = Where (padded4, low_f, crossed)"""
    )
    decoder = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    toy (int64[B, S] input_ids, {mask}
         float[B, 1, P, {DIM}] past_key_values.0.key, float[B, 1, P, {DIM}] past_key_values.0.value,
         float[B, 1, E, {DIM}] cross_key_values.0.key, float[B, 1, E, {DIM}] cross_key_values.0.value)
      => (float[B, S, {VOCAB}] logits, float[B, 1, T, {DIM}] present.0.key, float[B, 1, T, {DIM}] present.0.value)
    {{
      x = Gather (embed, input_ids)
      {_ATTEND}
      masked = Where (causal, scores, low_f)
      weights = Softmax <axis = -1> (masked)
      own = MatMul (weights, present.0.value)
      crossT = Transpose <perm = [0, 1, 3, 2]> (cross_key_values.0.key)
      crossed = MatMul (keys, crossT)
      {cross}
      crossWeights = Softmax <axis = -1> (there)
      other = MatMul (crossWeights, cross_key_values.0.value)
      both = Add (own, other)
      flat = Squeeze (both, axis1)
      logits = MatMul (flat, head)
    }}"""
    embed = {} if speech else {"embed": EMBED}
    onnx.save(_model(encoder, {"three": np.float32(3), **embed}), folder / "encoder.onnx")
    weights = {"embed": EMBED, "head": HEAD, "two_f": np.float32(2), "low_f": np.float32(-6e4)}
    onnx.save(_model(decoder, weights), folder / "decoder.onnx")
    return _engine(folder, "seq2seq", {"encoder": "encoder.onnx", "decoder": "decoder.onnx"}, 40)


def seq2seq_logits(hidden_ED: np.ndarray, ids: list[int]) -> np.ndarray:
    """[T, V] of the decoder's sequence, for what the encoder gave."""
    x = EMBED[ids].astype(np.float64)
    own = _attention(x, x, np.tril(np.ones((len(ids), len(ids)), bool)))
    other = _attention(x, hidden_ED.astype(np.float64), np.ones((len(ids), len(hidden_ED)), bool)) * 1.5
    return (own + other) @ HEAD


def encoder(folder: Path) -> Path:
    """A one-pass engine: input_ids, attention_mask, token_type_ids -> last_hidden_state (fp16 inside), count."""
    text = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    toy (int64[B, T] input_ids, int64[B, T] attention_mask, int32[B, T] token_type_ids)
      => (float16[B, T, {DIM}] last_hidden_state, int64[B, 1] count)
    {{
      words = Gather (embed, input_ids)
      kinds = Gather (embed, token_type_ids)
      both = Add (words, kinds)
      last_hidden_state = Cast <to = 10> (both)
      axis1 = Constant <value_ints = [1]> ()
      count = ReduceSum <keepdims = 1> (attention_mask, axis1)
    }}"""
    onnx.save(_model(text, {"embed": EMBED}), folder / "model.onnx")
    return _engine(folder, "encoder", {"model": "model.onnx"}, None)


def _attention(queries: np.ndarray, keys: np.ndarray, seen: np.ndarray) -> np.ndarray:
    scores = np.where(seen, queries @ keys.T, -6e4)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ (2 * keys)


def _engine(folder: Path, kind: str, components: dict[str, str], context: int | None) -> Path:
    shape = {
        "kv_heads": 1,
        "head_dim": DIM,
        "vocab_size": VOCAB,
        "context_length": context,
        "eos_token_ids": [EOS],
        "pad_token_id": None,
        "decoder_start_token_id": START if kind == "seq2seq" else None,
        "cache": "concat",
    }
    engine = {"runtime": "onnxruntime", "kind": kind, "components": components, "settings": {"threads": 1}}
    engine["decoder"] = None if kind == "encoder" else shape
    (folder / "engine.json").write_text(json.dumps(engine))
    return folder
