"""Build the graph of an encoder from standard operators: post-norm transformer layers, and what a task computes behind.

Legend: B batch, T tokens, H hidden, D head_dim, V vocabulary.
"""

from __future__ import annotations

from pipeline.errors import StageError
from pipeline.parity.pooling import Pooling
from pipeline.stages.checkpoint import Checkpoint
from pipeline.stages.onnx.encoder_families import Encoder
from pipeline.stages.onnx.families import Unknown
from pipeline.stages.onnx.graph import Graph

_TOKENS = ["batch", "sequence"]
_FLOAT, _BOOL = 1, 9


def build_encoder(encoder: Encoder, checkpoint: Checkpoint, pooling: Pooling | None) -> Graph:
    """The graph, with weights as references into the checkpoint's files.

    Inputs: input_ids, attention_mask and, where the model has token types, token_type_ids [B, T] int64. Outputs: those
    of the task; with `pooling` also sentence_embedding [B, H]. StageError when a tensor is missing or of a wrong shape,
    UnavailableError when a layer has tensors that this graph would leave out.
    """
    return _Builder(encoder, checkpoint).build(pooling)


class _Builder:
    def __init__(self, encoder: Encoder, checkpoint: Checkpoint) -> None:
        self.e, self.checkpoint, self.g = encoder, checkpoint, Graph(encoder.family)
        self.used: set[str] = set()
        bare = f"{encoder.prefix}embeddings.word_embeddings.weight" not in checkpoint
        self.base = "" if bare and encoder.task == "feature-extraction" else encoder.prefix

    def build(self, pooling: Pooling | None) -> Graph:
        hidden = self._embedded()
        for layer in range(self.e.layers):
            hidden = self._layer(layer, hidden)
        getattr(self, f"_{self.e.task.replace('-', '_')}")(hidden)
        if pooling is not None:
            self._pool(hidden, pooling)
        self._refuse_left_over()
        return self.g

    # embeddings and layers

    def _embedded(self) -> str:
        g, e, name = self.g, self.e, f"{self.base}embeddings"
        ids = g.input("input_ids", "int64", _TOKENS)
        mask = g.input("attention_mask", "int64", _TOKENS)
        vectors = g.node("Gather", [self._weight(f"{name}.word_embeddings.weight"), ids], f"{name}.word")
        if e.types:
            kinds = self._weight(f"{name}.token_type_embeddings.weight")
            given = g.input("token_type_ids", "int64", _TOKENS) if e.types > 1 else g.constant(0)
            vectors = g.node("Add", [vectors, g.node("Gather", [kinds, given], f"{name}.type")], f"{name}.typed")
        places = self._weight(f"{name}.position_embeddings.weight")
        placed = g.node("Gather", [places, self._positions(ids)], f"{name}.position")
        vectors = g.node("Add", [vectors, placed], f"{name}.sum")
        # [B, 1, T, T]: who may be looked at, for every head and every token.
        real = g.node("Cast", [mask], "mask.bool", to=_BOOL)
        real = g.node("Unsqueeze", [real, g.constant([1, 2])], "mask.row")
        length = g.node("Shape", [mask], "mask.length", start=1, end=2)
        ones = g.constant([1])
        shape = g.node("Concat", [ones, ones, length, ones], "mask.shape", axis=0)
        self.mask = g.node("Expand", [real, shape], "mask.square")
        return self._norm(f"{name}.LayerNorm", vectors)

    def _positions(self, ids: str) -> str:
        g = self.g
        if self.e.pad < 0:
            length = g.node("Shape", [ids], "positions.length", start=1, end=2)
            length = g.node("Squeeze", [length], "positions.count")
            return g.node("Range", [g.constant(0), length, g.constant(1)], "positions")
        pad = g.constant(self.e.pad)
        padding = g.node("Equal", [ids, pad], "positions.padding")
        real = g.node("Cast", [g.node("Not", [padding], "positions.is_real")], "positions.real", to=7)
        counted = g.node("CumSum", [real, g.constant(1)], "positions.counted")
        return g.node("Add", [g.node("Mul", [counted, real], "positions.only_real"), pad], "positions")

    def _layer(self, index: int, hidden: str) -> str:
        g, e = self.g, self.e
        name = self.base + e.names["layer"].format(index)
        heads = [self._split(f"{name}{e.names[role]}", hidden) for role in ("query", "key", "value")]
        scale = float((e.hidden // e.heads) ** -0.5)
        attended = g.node("Attention", [*heads, self.mask], f"{name}attention", scale=scale)
        attended = g.node("Transpose", [attended], f"{name}attention.tokens", perm=[0, 2, 1, 3])
        attended = g.node("Reshape", [attended, g.constant([0, 0, e.hidden])], f"{name}attention.flat")
        attended = self._linear(f"{name}{e.names['out']}", attended)
        hidden = self._norm(name + e.names["norm1"], g.node("Add", [attended, hidden], f"{name}attention.residual"))
        inner = self._activated(e.activation, self._linear(f"{name}{e.names['up']}", hidden), f"{name}activation")
        outer = self._linear(f"{name}{e.names['down']}", inner)
        last = ["last_hidden_state"] if e.task == "feature-extraction" and index == e.layers - 1 else []
        return self._norm(name + e.names["norm2"], g.node("Add", [outer, hidden], f"{name}residual"), last)

    def _split(self, name: str, hidden: str) -> str:
        """[B, T, H] -> [B, heads, T, D]"""
        e, g = self.e, self.g
        projected = self._linear(name, hidden, e.hidden)
        projected = g.node("Reshape", [projected, g.constant([0, 0, e.heads, e.hidden // e.heads])], f"{name}.heads")
        return g.node("Transpose", [projected], f"{name}.by_head", perm=[0, 2, 1, 3])

    # tasks

    def _feature_extraction(self, hidden: str) -> None:
        self.g.output("last_hidden_state", "float32", [*_TOKENS, self.e.hidden])

    def _text_classification(self, hidden: str) -> None:
        g, head = self.g, self.e.head
        first = g.node("Gather", [hidden, g.constant(0)], "first_token", axis=1)
        dense = self._activated(head["activation"], self._linear(head["dense"], first), "pooled")
        g.output("logits", "float32", ["batch", self._labels(head["out"])])
        self._linear(head["out"], dense, outputs=["logits"])

    def _token_classification(self, hidden: str) -> None:
        self.g.output("logits", "float32", [*_TOKENS, self._labels("classifier")])
        self._linear("classifier", hidden, outputs=["logits"])

    def _question_answering(self, hidden: str) -> None:
        g = self.g
        both = self._linear("qa_outputs", hidden, 2)
        for index, name in enumerate(("start_logits", "end_logits")):
            g.output(name, "float32", _TOKENS)
            g.node("Gather", [both, g.constant(index)], name, axis=2, outputs=[name])

    def _fill_mask(self, hidden: str) -> None:
        g, head = self.g, self.e.head
        words = self._weight(f"{self.base}embeddings.word_embeddings.weight")
        vocab = self.checkpoint[f"{self.base}embeddings.word_embeddings.weight"].shape[0]
        inner = self._activated(head["activation"], self._linear(head["dense"], hidden), "masked.activation")
        inner = self._norm(head["norm"], inner)
        turned = g.node("Transpose", [words], "masked.words", perm=[1, 0])
        product = g.node("MatMul", [inner, turned], head["decoder"])
        g.output("logits", "float32", [*_TOKENS, vocab])
        g.node("Add", [product, self._weight(head["bias"], (vocab,))], "masked.logits", outputs=["logits"])

    def _pool(self, tokens: str, pooling: Pooling) -> None:
        g = self.g
        if pooling.mode == "cls":
            vector = g.node("Gather", [tokens, g.constant(0)], "pooling.first", axis=1)
        else:
            mask = g.node("Unsqueeze", ["attention_mask", g.constant([2])], "pooling.mask")
            weights = g.node("Cast", [mask], "pooling.weights", to=_FLOAT)
            total = g.node("Mul", [tokens, weights], "pooling.weighted")
            total = g.node("ReduceSum", [total, g.constant([1])], "pooling.total", keepdims=0)
            count = g.node("ReduceSum", [weights, g.constant([1])], "pooling.count", keepdims=0)
            count = g.node("Clip", [count, g.constant(1e-9, "float32")], "pooling.at_least")
            vector = g.node("Div", [total, count], "pooling.mean")
        g.output("sentence_embedding", "float32", ["batch", self.e.hidden])
        if not pooling.normalize:
            g.node("Identity", [vector], "pooling.vector", outputs=["sentence_embedding"])
            return
        length = g.node("ReduceL2", [vector, g.constant([1])], "pooling.length", keepdims=1)
        length = g.node("Clip", [length, g.constant(1e-12, "float32")], "pooling.positive")
        g.node("Div", [vector, length], "pooling.normalized", outputs=["sentence_embedding"])

    # parts

    def _activated(self, kind: str, values: str, name: str) -> str:
        if kind in ("relu", "tanh"):
            return self.g.node(kind.capitalize() if kind == "tanh" else "Relu", [values], name)
        return self.g.node("Gelu", [values], name, approximate="none" if kind == "gelu" else "tanh")

    def _norm(self, name: str, values: str, outputs: list[str] | None = None) -> str:
        parts = [values, *(self._weight(f"{name}.{part}", (self.e.hidden,)) for part in ("weight", "bias"))]
        epsilon = self.e.epsilon
        return self.g.node("LayerNormalization", parts, name, outputs=outputs or [], axis=-1, epsilon=epsilon)

    def _linear(self, name: str, values: str, size: int = 0, outputs: list[str] | None = None) -> str:
        weight = self.checkpoint.take(f"{name}.weight")
        if len(weight.shape) != 2 or (size and weight.shape[0] != size):
            raise StageError(
                f"{weight.path.name}: tensor '{weight.name}' has shape {list(weight.shape)}"
                + (f", and a matrix of {size} rows is wanted" if size else ", and a matrix is wanted"),
                hint="config.json and the weights are not of the same model",
            )
        g = self.g
        turned = g.node("Transpose", [self._weight(weight.name)], f"{name}.turned", perm=[1, 0])
        product = g.node("MatMul", [values, turned], name)
        bias = self._weight(f"{name}.bias", weight.shape[:1])
        return g.node("Add", [product, bias], f"{name}.biased", outputs=outputs or [])

    def _labels(self, name: str) -> int:
        return self.checkpoint.take(f"{name}.weight").shape[0]

    def _weight(self, name: str, shape: tuple[int, ...] | None = None) -> str:
        self.used.add(name)
        return self.g.weight(self.checkpoint.take(name, shape))

    def _refuse_left_over(self) -> None:
        """Heads of other tasks may be there; tensors of a layer that nobody reads mean another computation."""
        inside = tuple(self.base + part for part in ("embeddings.", self.e.names["layer"].partition("{")[0]))
        for name in self.checkpoint:
            if name.startswith(inside) and name not in self.used and not name.endswith("position_ids"):
                raise Unknown(
                    f"the fused exporter has no place for the tensor '{name}' of a {self.e.family} model",
                    hint="does config.json count all its layers? Else use the torch exporter (exporter: torch)",
                )
