"""The validator of LLM checkpoints: what the engines silently accept is refused here.

It reads a Hugging Face folder, derives from config.json which tensors there have to be, of which type and shape, and
compares values with the source checkpoint. It shares nothing with the quantizer but the table of families: packing is
read by `llm_unpack`, shapes are derived again. Works tensor by tensor.

Legend: N output channels, K inputs, G groups of a row.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import EnginewrightError, VerificationError
from pipeline.frozen import frozen
from pipeline.stages.checkpoint import Checkpoint, Tensor, as_float32, read_header
from pipeline.stages.llm import unpack as llm_unpack
from pipeline.stages.llm.family import Family, Linear, describe, table
from pipeline.stages.llm.fields import config_problems

LIMITS = {"w4a16": 0.30, "awq": 0.30, "gptq": 0.30, "w8a8": 0.05, "fp8": 0.05, "fp8-block": 0.05}
"""Largest relative error (Frobenius norm) of a linear. Measured: int4 0.08 to 0.16, int8 0.008, fp8 0.026."""
ROW_LIMITS = {"w4a16": 0.60, "awq": 0.60, "gptq": 0.60, "w8a8": 0.15, "fp8": 0.15, "fp8-block": 0.30}
"""The same of one output channel."""
HALF_STEP = 0.52
"""Rounding to nearest: largest error of a weight in steps of its grid, the rounding of the scale included."""
CLIPPED = 5.5
"""int4: how far beyond the end of its grid a weight may lie: the search for scales leaves out up to 0.39 of the range,
and where a group's extremes are far from symmetric, its largest weight lies half a step beyond the grid."""
_PLAIN = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")


@frozen
class Problem:
    """What is wrong, and where."""

    where: str
    """A tensor, a file, or a field of config.json."""
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def require(folder: Path, source: Path | None = None, folds: Path | None = None, method: str = "") -> None:
    """Raise VerificationError with the first problems of a folder."""
    problems = list(examine(folder, source, folds, method))
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:8])
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise VerificationError(
            f"the checkpoint is not valid:{shown}{more}",
            hint="an engine may load it all the same and answer nonsense: build it again, and report it if it stays",
        )


def examine(folder: Path, source: Path | None = None, folds: Path | None = None, method: str = "") -> Iterator[Problem]:
    """Every problem of a checkpoint's folder.

    With `source`, the unquantized model folder, values are compared with it; `folds` holds the scales that were moved
    between its tensors. `method` rtn also bounds every single weight's error.
    """
    try:
        checkpoint = Checkpoint(folder)
        config = checkpoint.config
        family = describe(config)
        layout = llm_unpack.layout_of(config)
    except (EnginewrightError, KeyError) as error:
        yield Problem("config.json", getattr(error, "message", f"field {error} is missing"))
        return
    yield from _files(folder)
    wrong = [Problem(f"config.json: {where}", what) for where, what in config_problems(config, family, layout)]
    yield from wrong
    shapes = list(_shapes(checkpoint, family, layout, config))
    yield from shapes
    if wrong or shapes:
        return  # values of tensors of the wrong kind mean nothing
    try:
        for number, linear in _all_linears(family):
            yield from _values(checkpoint, family.layer(number) + linear.name, layout)
        yield from _floats(checkpoint, family, layout)
        if source is not None:
            yield from _against(checkpoint, Checkpoint(source), family, layout, folds, method)
    except EnginewrightError as error:
        yield Problem(folder.name, error.message)


def _files(folder: Path) -> Iterator[Problem]:
    """World-readable, and nothing that another loader would take for weights."""
    named = set()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        total = sum(t.length for shard in sorted(named) for t in read_header(folder / shard).values())
        if json.loads(index.read_text("utf-8")).get("metadata", {}).get("total_size") != total:
            yield Problem(index.name, f"metadata.total_size is not the {total} bytes of the tensors")
    else:
        named = {"model.safetensors"}
    for path in sorted(folder.iterdir()):
        if path.name == "triton_models":
            yield Problem(path.name, "LMDeploy takes a folder of this name for a converted model, and cannot load it")
        if path.suffix in _WEIGHT_SUFFIXES and path.name not in named:
            yield Problem(path.name, "a file of weights that does not belong to the checkpoint")
        if not path.stat().st_mode & stat.S_IROTH:
            yield Problem(path.name, "is not readable for everybody: a server under another user cannot load it")


def _all_linears(family: Family) -> Iterator[tuple[int, Linear]]:
    return ((number, linear) for number in range(family.layers) for linear in family.linears)


def wanted(
    family: Family, layout: str, config: Mapping[str, Any]
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Tensor -> (types that it may have, shape) of the checkpoint that a config.json describes."""
    plain = (_PLAIN.get(str(config.get("torch_dtype") or config.get("dtype")), "F32"),)
    found: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
    packed = {family.layer(number) + linear.name: linear for number, linear in _all_linears(family)}
    for name, shape in family.tensors():
        linear = packed.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if linear is None or layout == "plain":
            found[name] = plain, shape
            continue
        stem = name.removesuffix(".weight")
        for suffix, types, inner in _packed(linear, layout, config["quantization_config"], plain):
            found[f"{stem}.{suffix}"] = types, inner
    return found


def _packed(
    linear: Linear, layout: str, told: Mapping[str, Any], plain: tuple[str, ...]
) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """(suffix, types, shape) of the tensors of one quantized linear."""
    n, k = linear.out_features, linear.in_features
    if layout == "w4a16":
        weights = told["config_groups"]["group_0"]["weights"]
        groups = k // weights["group_size"]
        yield "weight_packed", ("I32",), (n, k // 8)
        yield "weight_scale", plain, (n, groups)
        yield "weight_shape", ("I64",), (2,)
        if not weights["symmetric"]:
            yield "weight_zero_point", ("I32",), (n // 8, groups)
    elif layout in ("awq", "gptq"):
        groups = k // told["group_size"]
        yield "qweight", ("I32",), (k, n // 8) if layout == "awq" else (k // 8, n)
        yield "qzeros", ("I32",), (groups, n // 8)
        yield "scales", plain, (groups, n)
        if layout == "gptq":
            yield "g_idx", ("I32",), (k,)
    elif layout == "fp8-block":
        yield "weight", ("F8_E4M3",), (n, k)
        yield "weight_scale_inv", ("F32",), (math.ceil(n / 128), math.ceil(k / 128))
    else:
        yield "weight", ("I8",) if layout == "w8a8" else ("F8_E4M3",), (n, k)
        yield "weight_scale", plain, (n, 1)


def _shapes(checkpoint: Checkpoint, family: Family, layout: str, config: Mapping[str, Any]) -> Iterator[Problem]:
    try:
        expected = wanted(family, layout, config)
    except (KeyError, TypeError, ZeroDivisionError):
        return  # a field that config_problems has named
    for name, (types, shape) in expected.items():
        if name not in checkpoint:
            yield Problem(name, "is missing")
            continue
        stored = checkpoint[name]
        if stored.shape != shape:
            yield Problem(name, f"has shape {list(stored.shape)}; config.json makes it {list(shape)}")
        if stored.dtype not in types:
            yield Problem(name, f"has type {stored.dtype}, not {' or '.join(types)}")
    for name in checkpoint:
        if name not in expected:
            yield Problem(name, "does not belong to the model: no engine reads it")


def _values(tensors: Mapping[str, Tensor], name: str, layout: str) -> Iterator[Problem]:
    """Scales, codes and zero points of one linear."""
    if layout == "plain":
        return
    scale, zero = llm_unpack.grid(tensors, name, layout)
    if not np.isfinite(scale).all() or (scale <= 0).any():
        yield Problem(name, "has a scale that is not a positive number")
    if zero is not None and zero.max(initial=0) > 15:
        yield Problem(name, "has a zero point above 15")
    if layout in ("fp8", "fp8-block") and np.isnan(llm_unpack.codes(tensors, name, layout)).any():
        yield Problem(name, "has a weight that is NaN")
    if layout == "w4a16":
        told = tensors[f"{name}.weight_shape"].numpy("native").tolist()
        packed = tensors[f"{name}.weight_packed"].shape
        if told != [packed[0], packed[1] * 8]:
            yield Problem(f"{name}.weight_shape", f"says {told}, the packed weight has {[packed[0], packed[1] * 8]}")
    if layout == "gptq":
        groups = tensors[f"{name}.g_idx"].numpy("native")
        size = len(groups) // tensors[f"{name}.scales"].shape[0]
        if (groups != np.arange(len(groups)) // size).any():
            yield Problem(f"{name}.g_idx", "is not in order, and TurboMind does not read it")


def _floats(checkpoint: Checkpoint, family: Family, layout: str) -> Iterator[Problem]:
    """Every unquantized tensor is finite: reading one checks it."""
    for name, _ in family.tensors():
        if name in checkpoint and checkpoint[name].dtype in ("F32", "F16", "BF16"):
            for _ in checkpoint[name].slices():
                pass
    yield from ()


def _against(
    checkpoint: Checkpoint, source: Checkpoint, family: Family, layout: str, folds: Path | None, method: str
) -> Iterator[Problem]:
    """Dequantized weights against the source's, scaled as they were folded."""
    for number in range(family.layers):
        prefix = family.layer(number)
        scales = _folds(folds, number)
        for linear in family.linears:
            name = prefix + linear.name
            reference = source[f"{name}.weight"].numpy()
            for fold in family.folds:
                if fold.source in scales and linear.name in fold.to:
                    reference = reference * scales[fold.source]
                if fold.source in scales and linear.name == fold.source:
                    reference = reference / scales[fold.source][:, None]
            if layout == "plain":
                yield from _equal(checkpoint[f"{name}.weight"], reference)
            else:
                yield from _near(checkpoint, name, layout, reference, method)
        for fold in family.folds:
            if fold.norm:
                name = f"{prefix}{fold.source}.weight"
                scale = scales.get(fold.source, np.float32(1))
                offset = np.float32(family.norm_offset)
                kept = (checkpoint[name].numpy() + offset) * scale - offset
                if not np.allclose(kept, source[name].numpy(), rtol=2**-8, atol=1e-6 + abs(family.norm_offset) * 2**-8):
                    yield Problem(name, "is not the source's norm divided by the scales that were folded")
        for name in (*(prefix + other for other in family.others), *_biases(family, prefix)):
            stem = name.removeprefix(prefix).rpartition(".")[0]
            if stem not in scales:
                yield from _equal(checkpoint[name], source[name].numpy())
    for name, _ in family.tensors():
        if not name.startswith("model.layers."):
            for start, rows in checkpoint[name].slices():
                yield from _equal(checkpoint[name], source[name].rows(start, start + len(rows)), rows)


def _biases(family: Family, prefix: str) -> Iterator[str]:
    return (f"{prefix}{linear.name}.bias" for linear in family.linears if linear.bias)


def _folds(folder: Path | None, number: int) -> dict[str, Any]:
    file = folder / f"layer-{number:05d}.safetensors" if folder else None
    if file is None or not file.is_file():
        return {}
    return {name: tensor.numpy() for name, tensor in read_header(file).items()}


def _equal(stored: Tensor, reference: Any, values: Any = None) -> Iterator[Problem]:
    """The stored tensor is the reference, rounded to its type."""
    values = stored.numpy() if values is None else values
    if stored.dtype == "BF16":
        bits = np.ascontiguousarray(reference, np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # nearest, ties to even
        reference = as_float32(rounded, "BF16")
    elif stored.dtype == "F16":
        reference = reference.astype(np.float16).astype(np.float32)
    if not np.array_equal(values, reference):
        worst = float(np.abs(values - reference).max())
        yield Problem(stored.name, f"differs from the source by up to {worst:.3g}")


def _near(tensors: Mapping[str, Tensor], name: str, layout: str, reference: Any, method: str) -> Iterator[Problem]:
    scale, zero = llm_unpack.grid(tensors, name, layout)
    error = llm_unpack.scaled(llm_unpack.codes(tensors, name, layout), scale, zero) - reference
    size = float(np.linalg.norm(reference))
    relative = float(np.linalg.norm(error)) / size if size else float(np.abs(error).max())
    if not relative <= LIMITS[layout]:
        yield Problem(name, f"its weights are off by {relative:.3g} of their size (at most {LIMITS[layout]})")
        return
    rows = np.linalg.norm(reference, axis=1)
    of_rows = np.divide(np.linalg.norm(error, axis=1), rows, out=np.zeros_like(rows), where=rows > 1e-3 * rows.max())
    if not of_rows.max() <= ROW_LIMITS[layout]:
        yield Problem(name, f"output channel {int(of_rows.argmax())} is off by {of_rows.max():.3g} of its size")
    if method == "rtn" and zero is not None:
        steps = np.abs(error) / np.repeat(scale, error.shape[1] // scale.shape[1], axis=1)
        codes = llm_unpack.codes(tensors, name, layout)
        inside = np.where((codes > codes.min()) & (codes < codes.max()), steps, 0.0).max()
        if not inside <= HALF_STEP:
            yield Problem(name, f"a weight is {inside:.3g} steps from its source: rounding to nearest gives half")
        elif not steps.max() <= HALF_STEP + CLIPPED:
            yield Problem(
                name, f"a weight is {steps.max():.3g} steps from its source: clipping gives at most {CLIPPED}"
            )


def known_layouts() -> tuple[str, ...]:
    """Every layout that the table has."""
    return tuple(table()["layouts"])
