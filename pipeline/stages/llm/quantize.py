"""Stage llm.quantize: a decoder's checkpoint, quantized and written layer by layer.

Peak memory is a small multiple of one layer, whatever the model's size. Every layer's shard is in place as soon as it
is made, and a stage that was killed goes on with the next layer.

Writes `weights/` (shards, index, config.json), `folds/` (the scales that were moved between tensors: what the
validator needs to compare the weights with the source) and `quantize.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StageError
from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.size import holding
from pipeline.stages.llm.observe import TOOLS, calibration_ids, reproducible
from pipeline.stages.llm.scheme import Scheme
from pipeline.step import Inputs, Progress, Stage

if TYPE_CHECKING:
    from pipeline.stages.checkpoint import Checkpoint
    from pipeline.stages.llm.family import Family
    from pipeline.stages.llm.search import Seen, Weights

Tensor = Any
_HARMLESS = ("rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry and nobody reads."""


@frozen(kw_only=True)
class QuantizeOptions:
    """What is made, and of gptq how much data it reads (awq and smoothquant read what llm.observe wrote)."""

    scheme: Scheme
    samples: int = option(0, "gptq: how many samples.", ge=0)
    length: int = option(0, "gptq: length of a sample.", unit="tokens", ge=0)
    smoothing: float = option(0.5, "smoothquant: 0 leaves the outliers in the activations, 1 moves them all.")
    damping: float = option(0.01, "gptq: what is added to the Gram matrix, as a share of its mean diagonal.")
    device: str = option("cpu", "Where torch runs: cpu or cuda.")


def run(inputs: Inputs, options: QuantizeOptions, out: Path, progress: Progress) -> None:
    """inputs: model; observed (awq, smoothquant); calibration (gptq). See the module."""
    from pipeline.stages.checkpoint import Checkpoint
    from pipeline.stages.llm.family import read_family
    from pipeline.stages.llm.shards import clear, write_index, write_json
    from pipeline.stages.tasks import read_config

    checkpoint = Checkpoint(inputs["model"])
    family = read_family(read_config(inputs["model"]))
    _check_tensors(checkpoint, family)
    for folder in (out / "weights", out / "folds"):
        clear(folder, lambda name: name.startswith(("model-", "layer-")) and not name.endswith(".part"))
    work = _Work(checkpoint, family, options, out, progress)
    with reproducible():
        work.ends()
        if options.scheme.method == "gptq":
            work.carried(inputs)
        else:
            work.apart(inputs.get("observed"))
    write_json(out / "weights" / "config.json", _config(checkpoint.config, options.scheme, family))
    write_index(out / "weights")
    told = {"method": options.scheme.method, "layout": options.scheme.layout, "layers": family.layers}
    write_json(out / "quantize.json", told)
    progress(family.layers, family.layers, "layers quantized")


@dataclass
class _Work:
    """The checkpoint on its way from source to shards."""

    checkpoint: Checkpoint
    family: Family
    options: QuantizeOptions
    out: Path
    progress: Progress

    def shard(self, number: int) -> Path:
        """Place of a shard: 0 the embeddings, 1 to layers the layers, then the rest."""
        from pipeline.stages.llm.shards import shard_name

        return self.out / "weights" / shard_name(number + 1, self.family.layers + 2)

    def ends(self) -> None:
        """Embeddings, norm and head: converted, never quantized."""
        from pipeline.stages.llm.family import EMBED, HEAD, NORM
        from pipeline.stages.llm.shards import streamed, write_shard

        tail = [NORM] if self.family.tied else [NORM, HEAD]
        for number, names in ((0, [EMBED]), (self.family.layers + 1, tail)):
            if not self.shard(number).exists():
                entries = [streamed(self.checkpoint[name], self.options.scheme.dtype) for name in names]
                write_shard(self.shard(number), entries)

    def apart(self, observed: Path | None) -> None:
        """Layers that depend on nothing but the source, and on what was observed of it."""
        for index in range(self.family.layers):
            if self.shard(index + 1).exists():
                continue
            self.progress(index, self.family.layers, "layers quantized")
            if not self.options.scheme.bits:
                self._plain(index)
                continue
            seen = _read_seen(observed / f"layer-{index:05d}.safetensors") if observed else {}
            weights = {name: self._load(index, name) for name, _ in self._names(index)}
            self._quantized(index, weights, seen)

    def carried(self, inputs: Inputs) -> None:
        """GPTQ: each layer is quantized for what the quantized layers before it give."""
        from pipeline.stages.llm.gptq import gptq_weight
        from pipeline.stages.llm.grid import dequantize
        from pipeline.stages.llm.walk import carried, carry, put, walk

        options = self.options
        ids = calibration_ids(inputs, self.family.vocab, options.samples, options.length)
        done, hidden = carried(self.out)

        def visit(index: int, layer: Any, hidden_STH: Tensor, forward: Callable[[], Tensor]) -> Tensor:
            self.progress(index, self.family.layers, "layers quantized")
            with _grams(layer, {self.family.reads(linear.name) for linear in self.family.linears}) as grams:
                forward()
            weights = {name: layer.get_parameter(name).data for name, _ in layer.named_parameters()}
            rounded = {}
            for linear in self.family.linears:
                gram = grams[self.family.reads(linear.name)]
                rounded[linear.name] = gptq_weight(
                    weights[f"{linear.name}.weight"].cpu(), gram, options.scheme, options.damping
                )
                put(layer, f"{linear.name}.weight", dequantize(rounded[linear.name]).to(options.device))
            self._write(index, {name: value.cpu() for name, value in weights.items()}, rounded)
            result = forward()
            carry(self.out, index, result)
            return result

        walk(inputs["model"], self.family, ids, visit, done=done, carried_STH=hidden, device=options.device)
        (self.out / f"carried-{self.family.layers - 1:05d}.safetensors").unlink(missing_ok=True)

    def _names(self, index: int) -> list[tuple[str, tuple[int, ...]]]:
        """(name within the layer, shape) of a layer's tensors."""
        prefix = self.family.layer(index)
        return [(n.removeprefix(prefix), shape) for n, shape in self.family.tensors() if n.startswith(prefix)]

    def _load(self, index: int, name: str) -> Tensor:
        import torch

        return torch.from_numpy(self.checkpoint[self.family.layer(index) + name].numpy())

    def _plain(self, index: int) -> None:
        from pipeline.stages.llm.shards import streamed, write_shard

        prefix, dtype = self.family.layer(index), self.options.scheme.dtype
        entries = [streamed(self.checkpoint[prefix + name], dtype) for name, _ in self._names(index)]
        write_shard(self.shard(index + 1), entries)

    def _quantized(self, index: int, weights: Weights, seen: Seen) -> None:
        from pipeline.stages.llm.grid import round_weight
        from pipeline.stages.llm.search import fold_layer
        from pipeline.stages.llm.shards import ready, write_shard

        scheme = self.options.scheme
        importance: dict[str, Tensor] = {}
        if seen:
            scales = fold_layer(weights, self.family, scheme, seen, self.options.smoothing)
            write_shard(
                self.out / "folds" / f"layer-{index:05d}.safetensors",
                [ready(name, scale) for name, scale in scales.items()],
            )
            for fold in self.family.folds:
                moved = scales.get(fold.source)
                square = seen[fold.to[0]]["meansq"]
                importance |= dict.fromkeys(fold.to, square if moved is None else square / moved.square())
            importance = {**{name: each["meansq"] for name, each in seen.items()}, **importance}
        rounded = {}
        for linear in self.family.linears:
            weight = weights[f"{linear.name}.weight"].to(self.options.device)
            given = importance.get(linear.name)
            if given is None and scheme.bits == 4:
                given = weight.new_ones(weight.shape[1])  # nothing was observed: every input counts alike
            made = round_weight(weight, scheme, None if given is None else given.to(self.options.device))
            rounded[linear.name] = made
            weights[f"{linear.name}.weight"] = None
        self._write(index, weights, rounded)

    def _write(self, index: int, weights: Weights, rounded: dict[str, Any]) -> None:
        """The layer's shard: packed linears, and the rest in the scheme's type."""
        import torch

        from pipeline.stages.llm.pack import pack
        from pipeline.stages.llm.scheme import TORCH_NAMES
        from pipeline.stages.llm.shards import ready, write_shard

        scheme, prefix = self.options.scheme, self.family.layer(index)
        dtype = getattr(torch, TORCH_NAMES[scheme.dtype])
        entries = []
        for name, _ in self._names(index):
            linear = name.removesuffix(".weight")
            if name.endswith(".weight") and linear in rounded:
                entries += [ready(*each) for each in pack(prefix + linear, rounded[linear], scheme).items()]
                continue
            kept = weights[name].to(dtype)
            if not bool(torch.isfinite(kept).all()):
                raise StageError(
                    f"a value of '{prefix}{name}' does not fit into {scheme.dtype}", hint="choose `dtype: bf16`"
                )
            entries.append(ready(prefix + name, kept))
        write_shard(self.shard(index + 1), entries)


def _read_seen(path: Path) -> Seen:
    import torch

    from pipeline.stages.checkpoint import read_header

    seen: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_header(path).items():
        linear, _, what = name.rpartition(".")
        seen.setdefault(linear, {})[what] = torch.from_numpy(tensor.numpy())
    return seen


def _grams(layer: Any, names: set[str]) -> Any:
    """Inside, forward passes of the layer fill the result: linear -> mean of x x^T [K, K] float32."""
    import contextlib

    import torch

    @contextlib.contextmanager
    def watching() -> Any:
        grams: dict[str, Tensor] = {}
        counts = dict.fromkeys(names, 0)

        def hook(name: str) -> Callable[..., None]:
            def add(module: Any, args: tuple[Any, ...]) -> None:
                x = args[0].reshape(-1, args[0].shape[-1])
                if name not in grams:
                    grams[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
                grams[name] += x.T @ x
                counts[name] += len(x)

            return add

        handles = [layer.get_submodule(name).register_forward_pre_hook(hook(name)) for name in sorted(names)]
        try:
            yield grams
        finally:
            for handle in handles:
                handle.remove()
            for name in grams:
                grams[name] = (grams[name] / counts[name]).cpu()

    return watching()


def _check_tensors(checkpoint: Checkpoint, family: Family) -> None:
    """The checkpoint has every tensor with the shape that config.json asks for, and none that would be lost."""
    known = set()
    for name, shape in family.tensors():
        checkpoint.take(name, shape, "see the model's config.json")
        known.add(name)
    from pipeline.stages.llm.family import HEAD

    strays = [n for n in checkpoint if n not in known and not n.endswith(_HARMLESS) and not (family.tied and n == HEAD)]
    if strays:
        raise StageError(
            f"the checkpoint has '{strays[0]}', which no {family.model_type} layer reads"
            + (f", and {len(strays) - 1} more" if len(strays) > 1 else ""),
            hint="config.json and the weights are not of the same model, or the family needs an entry of its own",
        )


def _config(config: dict[str, Any], scheme: Scheme, family: Family) -> dict[str, Any]:
    """config.json of the result."""
    from pipeline.stages.llm.scheme import TORCH_NAMES, quantization_config

    told = {name: value for name, value in config.items() if name not in ("torch_dtype", "dtype", "_name_or_path")}
    told["torch_dtype"] = TORCH_NAMES[scheme.dtype]
    quantization = quantization_config(scheme, family)
    return told if quantization is None else {**told, "quantization_config": quantization}


STAGE = Stage(
    "llm.quantize", run, version=3, tools=TOOLS, scope="isa", resumable=True, memory=holding(300, largest=1.5, layer=3)
)
