"""Read and write a directory of reference inputs and outputs, one sample at a time.

Layout: `reference.json` (or `golden.json`, the same fields), `inputs.<name>.npy`, `outputs.<name>.npy` with the samples
on the first axis, `greedy.json` for models that generate. Samples of unequal length are padded on the right with
zeros; `lengths` says for each padded array how long each sample is. Of an output named in `kept` only the last so many
positions of each sample are stored.

Arrays are read with plain reads of one sample, not mapped: mapped pages would count as the process's memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import VerificationError
from pipeline.frozen import frozen

Array = npt.NDArray[Any]


class Greedy(NamedTuple):
    """Greedy continuations of the reference."""

    prompts: list[list[int]] | None
    """None: the model's prompts are not text, and the stored inputs are continued."""
    new_tokens: int
    tokens: list[list[int]]
    """The new token ids of each prompt, the end token included."""


@frozen
class NpyFile:
    """An array in a .npy file (C order) that is read sample by sample."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int

    @classmethod
    def open(cls, path: Path) -> NpyFile:
        """Read the header. Raises VerificationError when the file is missing, cut short or not an array."""
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(file)
                offset = file.tell()
            size = path.stat().st_size
        except (OSError, ValueError) as error:
            raise VerificationError(f"{path.name}: not a readable array: {error}", hint="build it again") from error
        if fortran or size != offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
            raise VerificationError(f"{path.name}: {size} bytes do not fit shape {shape}", hint="build it again")
        return cls(path, tuple(shape), dtype, offset)

    def __getitem__(self, sample: int) -> Array:
        """A copy of one sample."""
        count = int(np.prod(self.shape[1:], dtype=np.int64))
        offset = self.offset + sample * count * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, count, offset=offset).reshape(self.shape[1:])


class NpyWriter:
    """Write an array of known shape sample by sample; a shorter sample is padded on its first axis with zeros."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._file = path.open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, sample: Array) -> None:
        """Write the next sample, [t, ...] with t up to the array's length."""
        whole = np.zeros(self.shape[1:], self.dtype)
        whole[: len(sample)] = sample
        self._file.write(whole.tobytes())

    def __enter__(self) -> NpyWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


@frozen
class Stored:
    """Reference inputs and outputs on disk."""

    path: Path
    info: Mapping[str, Any]
    """The fields of `reference.json`."""
    arrays: Mapping[str, NpyFile]
    """By file stem: `inputs.input_ids`, `outputs.logits`."""

    @classmethod
    def open(cls, path: Path, name: str = "reference.json") -> Stored:
        """Open a directory. Raises VerificationError when a file is missing or does not fit the others."""
        info = _json(path / name)
        try:
            stems = [f"inputs.{n}" for n in info["inputs"]] + [f"outputs.{n}" for n in info["outputs"]]
            arrays = {stem: NpyFile.open(path / f"{stem}.npy") for stem in stems}
            if any(array.shape[0] != info["samples"] for array in arrays.values()):
                raise VerificationError(f"{name}: an array does not have {info['samples']} samples")
            _ = info["kind"], info["task"], info["lengths"], info["kept"], info["eos_token_ids"]
        except KeyError as error:
            raise VerificationError(f"{name}: the field {error} is missing", hint="build it again") from error
        return cls(path, info, arrays)

    @property
    def kind(self) -> str:
        """decoder, seq2seq or encoder."""
        return str(self.info["kind"])

    @property
    def task(self) -> str:
        return str(self.info["task"])

    @property
    def samples(self) -> int:
        return int(self.info["samples"])

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(self.info["outputs"])

    def length(self, name: str, sample: int) -> int | None:
        """How many positions of an array's sample are not padding; None for an array without padding."""
        lengths = self.info["lengths"].get(name)
        return None if lengths is None else int(lengths[sample])

    def inputs(self, sample: int) -> dict[str, Array]:
        """Name -> [1, t, ...], a batch of one without padding."""
        return {
            name: self.arrays[f"inputs.{name}"][sample][: self.length(name, sample)][None]
            for name in self.info["inputs"]
        }

    def output(self, name: str, sample: int) -> tuple[int, Array]:
        """(first, array): the stored positions of an output, [t, ...], begin at position `first` of the sample."""
        array, length = self.arrays[f"outputs.{name}"][sample], self.length(name, sample)
        if length is None:
            return 0, array
        kept = min(self.info["kept"].get(name, length), length)
        return length - kept, array[:kept]

    def greedy(self) -> Greedy | None:
        """The greedy continuations; None for a model that does not generate."""
        file = self.path / "greedy.json"
        if not file.is_file():
            return None
        try:
            return Greedy(**_json(file))
        except TypeError as error:
            raise VerificationError(f"greedy.json: {error}", hint="build it again") from error


def write_json(path: Path, document: Any) -> None:
    """One JSON document with sorted keys; a value that is not finite has no place in it and raises ValueError."""
    path.write_text(json.dumps(document, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n", "utf-8")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise VerificationError(f"{path.name}: cannot be read: {error}", hint="build it again") from error
