"""Engines over a Hugging Face folder in torch: as transformers reads it, or dequantized by our own reader.

`open_transformers` is what the target `transformers` serves. `open_dequantized` reads the same folder without any
quantization library and computes in fp32 what a server's kernels compute, its rounding of activations included: it
says what the checkpoint is worth, not whether a server runs it.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.decoding import Decoder, decode
from pipeline.engine import Array, Sampling, Token
from pipeline.errors import StageError, UnavailableError
from pipeline.targets.ort_decoder import check_ids, joined, positions_of, token_inputs

Prompts = Sequence[Sequence[int]]
Tensor = Any
QMAX = {"vllm": 127.0, "compressed-tensors": 127.5}
"""What a token's largest activation becomes in int8: compressed-tensors scales by half the range, vLLM by its top."""


def open_transformers(folder: Path, settings: Mapping[str, Any] | None = None) -> TorchDecoder:
    """The folder as `AutoModelForCausalLM.from_pretrained` loads it.

    Settings: `dtype` (default: what the folder says), `device` (cpu, cuda), `compile`. Raises UnavailableError when a
    package is missing, StageError when transformers does not load the folder.
    """
    told = dict(settings or {})
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UnavailableError(
            f"transformers is not installed: {error}", hint="pip install 'enginewright[transformers]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = getattr(torch, told["dtype"]) if told.get("dtype") else "auto"
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except ImportError as error:
        raise UnavailableError(str(error), hint="pip install 'enginewright[transformers]'") from error
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise StageError(f"transformers does not load {folder.name}: {error}", hint="build it again") from error
    if dtype != "auto":
        model = model.to(dtype)  # its FP8 reader leaves what is not quantized in bf16, whatever it was asked for
    model = model.to(told.get("device") or "cpu").eval().requires_grad_(False)
    if told.get("compile"):
        model.forward = torch.compile(model.forward)
    return TorchDecoder(model, folder)


def open_dequantized(folder: Path, settings: Mapping[str, Any] | None = None) -> TorchDecoder:
    """The folder with its weights dequantized to fp32. Settings: `activations`, how they are rounded before each
    quantized product: `none`, `vllm`, `compressed-tensors`."""
    import torch
    import transformers

    from pipeline.stages.checkpoint import Checkpoint
    from pipeline.stages.llm.unpack import layout_of

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if (folder / "weights").is_dir():  # what llm.quantize wrote
        folder = folder / "weights"
    checkpoint = Checkpoint(folder)
    layout = layout_of(checkpoint.config)
    quantized = set(linears(checkpoint, layout))
    told = {name: value for name, value in checkpoint.config.items() if name != "quantization_config"}
    config = transformers.AutoConfig.for_model(**told)
    architecture = getattr(transformers, told["architectures"][0])
    model = architecture.from_pretrained(
        None, config=config, state_dict=dict(_dense(checkpoint, layout, quantized)), dtype=torch.float32
    )
    model.eval().requires_grad_(False)
    rule = str((settings or {}).get("activations", "none"))
    if rule != "none" and layout in ("w8a8", "fp8", "fp8-block"):
        rounding = _rounding(layout, rule)
        for name, module in model.named_modules():
            if name in quantized:
                module.register_forward_pre_hook(lambda module, args: (rounding(args[0]), *args[1:]))
    return TorchDecoder(model, folder)


def linears(names: Mapping[str, Any], layout: str) -> Iterator[str]:
    """The quantized linears of a checkpoint, by the tensors that only they have."""
    marks = {"w4a16": ".weight_packed", "awq": ".qweight", "gptq": ".qweight", "fp8-block": ".weight_scale_inv"}
    mark = marks.get(layout, ".weight_scale")
    return (name.removesuffix(mark) for name in names if layout != "plain" and name.endswith(mark))


def _dense(checkpoint: Any, layout: str, quantized: set[str]) -> Iterator[tuple[str, Tensor]]:
    import torch

    from pipeline.stages.llm.unpack import weight

    for name in sorted(quantized):
        yield f"{name}.weight", torch.from_numpy(weight(checkpoint, name, layout))
    for name, stored in checkpoint.items():
        holder, _, leaf = name.rpartition(".")
        if holder not in quantized or leaf == "bias":
            yield name, torch.from_numpy(stored.numpy())


def _rounding(layout: str, rule: str) -> Callable[[Tensor], Tensor]:
    """Activations as a server's dynamic quantization makes them: a scale a token, or for 128 channels of it."""
    import torch

    def token(x: Tensor) -> Tensor:
        top = QMAX[rule] if layout == "w8a8" else 448.0
        scale = (x.abs().amax(-1, keepdim=True) / top).clamp(min=torch.finfo(torch.float32).smallest_normal)
        if layout == "w8a8":
            return (x / scale).round().clamp(-128, 127) * scale
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale

    if layout == "fp8-block":
        return lambda x: token(x.unflatten(-1, (-1, 128))).flatten(-2)
    return token


class TorchDecoder:
    """The Engine of a causal language model of transformers."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model = model
        self._vocab = int(model.config.vocab_size)
        self._context = getattr(model.config, "max_position_embeddings", None)
        self._ends = end_tokens(folder)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """`input_ids` [B, T] and `attention_mask` [B, T] (0 = padding; may be absent) -> `logits` [B, T, V] float32."""
        ids, mask = token_inputs(inputs, self._vocab)
        return {"logits": self._forward(ids, mask, positions_of(mask)).float().cpu().numpy()}

    def generate(self, prompts: Prompts, sampling: Sampling) -> Iterator[Token]:
        """Token ids in, tokens out. See `pipeline.decoding`."""
        check_ids(prompts, self._vocab)
        ends, context = self._ends, self._context
        return decode(_Stepper(self._forward), prompts, prompts, sampling, eos_token_ids=ends, context_length=context)

    def decoder(self) -> Decoder:
        """For those who let prompts join and leave: see `pipeline.decoding.Batch`."""
        return Decoder(_Stepper(self._forward), self._vocab, self._ends, self._context)

    def _forward(self, ids: Array, mask: Array, positions: Array, cache: Any = None) -> Tensor:
        import torch

        with torch.inference_mode():
            place = self.model.device
            tensors = (torch.from_numpy(np.ascontiguousarray(array)).to(place) for array in (ids, mask, positions))
            names = ("input_ids", "attention_mask", "position_ids")
            told = {} if cache is None else {"past_key_values": cache}
            return self.model(**dict(zip(names, tensors, strict=True)), **told, use_cache=cache is not None).logits


@dataclass
class _Batch:
    cache: Any
    mask: Array


class _Stepper:
    """Prompts are padded on the left, so that every row's last token is in the last place."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self._forward = forward

    def prefill(self, prompts: Prompts, room: int) -> tuple[_Batch, Array]:
        import transformers

        longest = max(map(len, prompts))
        ids = np.zeros((len(prompts), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        state = _Batch(transformers.DynamicCache(), mask)
        return state, self._next(state, ids)

    def extend(self, state: _Batch, prompts: Prompts, room: int) -> Array:
        import torch

        other, logits = self.prefill(prompts, room)
        longest = max(state.mask.shape[1], other.mask.shape[1])
        for mine, theirs in zip(state.cache.layers, other.cache.layers, strict=True):
            for name in ("keys", "values"):
                both = [getattr(layer, name) for layer in (mine, theirs)]
                pad = torch.nn.functional.pad
                setattr(mine, name, torch.cat([pad(each, (0, 0, longest - each.shape[2], 0)) for each in both]))
        state.mask = joined(state.mask, other.mask)
        return logits

    def step(self, state: _Batch, tokens: Sequence[int], rows: Sequence[int]) -> Array:
        import torch

        if list(rows) != list(range(len(state.mask))):
            state.cache.batch_select_indices(torch.tensor(list(rows)))
            state.mask = state.mask[list(rows)]
        state.mask = np.pad(state.mask, ((0, 0), (0, 1)), constant_values=1)
        return self._next(state, np.asarray(tokens, np.int64)[:, None])

    def _next(self, state: _Batch, ids: Array) -> Array:
        positions = positions_of(state.mask)[:, -ids.shape[1] :]
        logits = self._forward(ids, state.mask, positions, state.cache)[:, -1].float().cpu().numpy()
        return np.asarray(logits)


def end_tokens(folder: Path) -> tuple[int, ...]:
    """What ends a text: generation_config.json, else config.json."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text("utf-8")).get("eos_token_id")
            if found is not None:
                return tuple(found) if isinstance(found, list) else (int(found),)
    return ()


def read_settings(folder: Path) -> dict[str, Any]:
    """`settings` of engine.json. StageError when it cannot be read."""
    try:
        found: dict[str, Any] = json.loads((folder / "engine.json").read_text("utf-8"))["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise StageError(f"{folder / 'engine.json'} cannot be read: {error!r}", hint="build it again") from error
    return found
