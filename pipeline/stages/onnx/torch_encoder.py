"""Encoders, classifiers and image models as flat modules: what the exporter traces, and what the engine's interface is.

Legend: B batch, T tokens, H hidden size.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError
from pipeline.parity.pooling import Pooling, read_pooling
from pipeline.stages.onnx.torch_export import Port, export_module

_TOKENS = ("batch", "sequence", None)
_OUTPUTS: dict[str, dict[str, tuple[str | None, ...]]] = {
    "feature-extraction": {"last_hidden_state": _TOKENS},
    "fill-mask": {"logits": _TOKENS},
    "token-classification": {"logits": _TOKENS},
    "text-classification": {"logits": ("batch", None)},
    "image-classification": {"logits": ("batch", None)},
    "question-answering": {"start_logits": _TOKENS[:2], "end_logits": _TOKENS[:2]},
}


def export_encoder(model: Any, task: str, folder: Path, opset: int) -> tuple[Any, Pooling | None]:
    """The graph of an encoder (onnx_ir.Model) and, for a sentence-transformers folder, the pooling inside it.

    Inputs: input_ids, attention_mask and, where the model has token types, token_type_ids [B, T] int64; or
    pixel_values [B, C, height, width] float32. With pooling there is a second output, sentence_embedding [B, H].
    """
    pooling = read_pooling(folder) if task == "feature-extraction" else None
    outputs = dict(_OUTPUTS[task])
    taken = tuple(outputs)
    if pooling is not None:
        outputs["sentence_embedding"] = ("batch", None)
    ports = [_image(model, folder)] if task == "image-classification" else _text(model)
    return export_module(_module(model, [port.name for port in ports], taken, pooling), ports, outputs, opset), pooling


def _module(model: Any, names: list[str], taken: tuple[str, ...], pooling: Pooling | None) -> Any:
    import torch

    class Encoder(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            given = dict(zip(names, tensors, strict=True))
            result = self.model(**given)
            found = tuple(getattr(result, name) for name in taken)
            if pooling is None:
                return found
            return (*found, _pool(found[0], given["attention_mask"], pooling))

    return Encoder()


def _pool(tokens_BTH: Any, mask_BT: Any, pooling: Pooling) -> Any:
    import torch

    if pooling.mode == "cls":
        vectors = tokens_BTH[:, 0]
    else:
        weights = mask_BT[:, :, None].to(tokens_BTH.dtype)
        vectors = (tokens_BTH * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(vectors, dim=1) if pooling.normalize else vectors


def _text(model: Any) -> list[Port]:
    import torch

    ids = torch.arange(33).remainder(int(model.config.vocab_size)).reshape(3, 11)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    ports = [Port("input_ids", ids, _TOKENS[:2]), Port("attention_mask", mask, _TOKENS[:2])]
    types = getattr(model.config, "type_vocab_size", None) or 0
    if types > 1 and "token_type_ids" in inspect.signature(model.forward).parameters:
        ports.append(Port("token_type_ids", torch.zeros_like(ids), _TOKENS[:2]))
    return ports


def _image(model: Any, folder: Path) -> Port:
    import torch

    height, width = _image_size(model.config, folder)
    channels = int(getattr(model.config, "num_channels", 3))
    return Port("pixel_values", torch.zeros(3, channels, height, width), ("batch", None, None, None))


def _image_size(config: Any, folder: Path) -> tuple[int, int]:
    """(height, width) in pixels, from config.json or preprocessor_config.json."""
    size = getattr(config, "image_size", None)
    if size is None and (folder / "preprocessor_config.json").is_file():
        processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        size = processor.get("crop_size") if processor.get("do_center_crop") else processor.get("size")
    if isinstance(size, dict):
        size = size.get("shortest_edge") or (size.get("height"), size.get("width"))
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return size[0], size[1]
    raise RecipeError(
        f"{folder.name}: no image size in config.json or preprocessor_config.json",
        hint='add "image_size" to config.json: the graph has one fixed size',
    )
