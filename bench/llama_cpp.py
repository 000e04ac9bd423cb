"""llama.cpp's own converter and quantizer, run from a source tree, as the peer that our GGUF files are held against.

    python bench/llama_cpp.py convert TREE MODEL OUT [f16|f32|bf16]
    python bench/llama_cpp.py quantize TREE IN OUT FTYPE [IMPORTANCE.npz]

TREE is llama.cpp's source with libllama built in TREE/build or beside it (docs/decisions/gguf.md has the commands). The
converter knows a tokenizer by a digest of token ids, which no new vocabulary has, or wants tokenizer.model: the tensors
are what is compared, so its vocabulary is left empty here.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

FTYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14,
    "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32, "MXFP4": 38,
}  # fmt: skip
"""llama.h's numbers."""


class _Importance(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Parameters(ctypes.Structure):
    _fields_ = (
        ("nthread", ctypes.c_int32), ("ftype", ctypes.c_int32), ("output_tensor_type", ctypes.c_int32),
        ("token_embedding_type", ctypes.c_int32), ("flags", ctypes.c_bool * 6),
        ("imatrix", ctypes.POINTER(_Importance)), ("kv_overrides", ctypes.c_void_p), ("tt_overrides", ctypes.c_void_p),
        ("prune_layers", ctypes.c_void_p), ("max_buf_size", ctypes.c_size_t),
    )  # fmt: skip


def convert(tree: Path, model: Path, out: Path, kind: str = "f16") -> None:
    """The official converter's file, without a vocabulary."""
    sys.path[:0] = [str(tree / "gguf-py"), str(tree)]
    import conversion  # type: ignore[import-not-found]
    import gguf
    import torch

    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
    hparams = conversion.ModelBase.load_hparams(model, False)
    architecture = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
    found = conversion.get_model_class(architecture)
    found.set_vocab = lambda self: None
    with torch.inference_mode():
        found(model, gguf.LlamaFileType[kinds[kind]], out).write()


def quantize(tree: Path, source: Path, out: Path, label: str, importance: Path | None = None, threads: int = 2) -> None:
    """llama_model_quantize on a file."""
    folder = next(p for p in (tree / "build", *(parent / "build" for parent in tree.parents)) if (p / "bin").is_dir())
    library = ctypes.CDLL(str(folder / "bin" / "libllama.so"))
    library.llama_model_quantize_default_params.restype = _Parameters
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters)]
    library.llama_backend_init()
    parameters = library.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype = threads, FTYPES[label]
    kept: list[Any] = []
    if importance:
        import numpy as np

        stored = np.load(importance)
        arrays = {name: np.ascontiguousarray(stored[name], np.float32) for name in stored.files}
        kept = [arrays, [name.encode() for name in arrays]]
        entries = [_Importance(name.encode(), array.ctypes.data, array.size) for name, array in arrays.items()]
        parameters.imatrix = (_Importance * (len(entries) + 1))(*entries)
    code = library.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters))
    del kept
    if code:
        raise SystemExit(f"llama_model_quantize gave {code}")


def main(argv: list[str]) -> None:
    verb, tree, source, out, *rest = argv
    if verb == "convert":
        convert(Path(tree), Path(source), Path(out), *rest)
    else:
        quantize(Path(tree), Path(source), Path(out), rest[0], Path(rest[1]) if rest[1:] else None)


if __name__ == "__main__":
    main(sys.argv[1:])
