"""Run an unquantized graph on calibration data and observe the range of its activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.stages import samples as text
from pipeline.stages.checkpoint import read_json
from pipeline.stages.onnx.int8 import Int8Options
from pipeline.step import Inputs, Progress

_BINS = 2048
_LEVELS = 128  # of a quantized magnitude: what the search for the entropy's threshold compares against


@dataclass
class Observed:
    """What a tensor's values were over all samples."""

    low: float
    high: float


def observe(
    path: Path, activations: Sequence[str], inputs: Inputs, options: Int8Options, progress: Progress
) -> dict[str, Observed]:
    """Name -> range of every tensor in `activations` over the calibration samples, one sample at a time.

    RecipeError when the data are empty, too few or not UTF-8.
    """
    config = read_json(inputs["model"] / "config.json")
    encoder = text.load_encoder(inputs["model"], int(config["vocab_size"]))
    length = min(options.length, _positions(config))
    found = text.sequences(text.data_file(inputs["calibration"]), encoder, options.samples, length)
    session = _session(path, list(activations))
    names = {value.name for value in session.get_inputs()}

    def passes(note: str) -> Iterator[dict[str, Any]]:
        for index, sample in enumerate(found):
            progress(index, len(found), note)
            ids = np.array([sample.ids], np.int64)
            given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            given["token_type_ids"] = np.array([sample.type_ids], np.int64)
            feed = {name: value for name, value in given.items() if name in names}
            yield dict(zip(activations, session.run(list(activations), feed), strict=True))

    observed: dict[str, Observed] = {}
    for values in passes("ranges"):
        for name, array in values.items():
            low, high = float(array.min()), float(array.max())
            if known := observed.get(name):
                known.low, known.high = min(known.low, low), max(known.high, high)
            else:
                observed[name] = Observed(low, high)
    if options.calibration != "minmax":
        _narrow(observed, passes("histograms"), options)
    return observed


def _positions(config: dict[str, Any]) -> int:
    value = config.get("max_position_embeddings")
    return value if isinstance(value, int) else 1 << 30


def _session(path: Path, names: list[str]) -> Any:
    """A session of the graph that gives the tensors `names` as well."""
    import onnx
    import onnxruntime

    model = onnx.load_model(path, load_external_data=False)
    present = {value.name for value in model.graph.output}
    for name in names:
        if name not in present:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # The order of sums depends on the number of threads, and the last bit of a scale on the sums.
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _narrow(observed: dict[str, Observed], values: Iterator[dict[str, Any]], options: Int8Options) -> None:
    """Replace the ranges by those of a histogram's percentile or least loss of information."""
    counts = {name: np.zeros(_BINS, np.int64) for name in observed}
    entropy = options.calibration == "entropy"
    for arrays in values:
        for name, array in arrays.items():
            known = observed[name]
            if entropy:
                array, span = np.abs(array), (0.0, max(-known.low, known.high))
            else:
                span = (known.low, known.high)
            counts[name] += np.histogram(array, bins=_BINS, range=span)[0]
    for name, known in observed.items():
        if entropy:
            limit = max(-known.low, known.high) * _best_cut(counts[name]) / _BINS
            known.low, known.high = max(known.low, -limit), min(known.high, limit)
        else:
            known.low, known.high = _quantiles(counts[name], known, options.percentile)


def _quantiles(counts: npt.NDArray[np.int64], known: Observed, percentile: float) -> tuple[float, float]:
    share = np.cumsum(counts) / counts.sum()
    width = (known.high - known.low) / _BINS
    first = int(np.searchsorted(share, 1 - percentile / 100, side="right"))
    last = int(np.searchsorted(share, percentile / 100))
    return known.low + first * width, known.low + (last + 1) * width


def _best_cut(counts: npt.NDArray[np.int64]) -> int:
    """How many bins of a histogram of magnitudes to keep, so that quantizing them to _LEVELS loses least information
    (Kullback-Leibler divergence between the clipped histogram and its quantized form)."""
    best, least = _BINS, np.inf
    for cut in range(_LEVELS, _BINS + 1, 16):
        kept = counts[:cut].astype(np.float64)
        full = kept.copy()
        full[-1] += counts[cut:].sum()
        level = np.arange(cut) * _LEVELS // cut
        used = kept > 0
        mass = np.bincount(level, kept, _LEVELS)
        bins = np.maximum(np.bincount(level, used, _LEVELS), 1)
        spread = np.where(used, (mass / bins)[level], 0)
        p, q = full / full.sum(), spread / max(spread.sum(), 1)
        both = (p > 0) & (q > 0)
        # What the clipping puts where the quantized form has nothing counts as lost.
        loss = float((p[both] * np.log(p[both] / q[both])).sum() + p[(p > 0) & ~both].sum())
        if loss < least:
            best, least = cut, loss
    return best
