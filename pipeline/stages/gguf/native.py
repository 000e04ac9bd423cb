"""llama.cpp's own kernels, from a prebuilt library: quantization of rows, and where the library is.

xllamacpp's extension module exports the functions of ggml.h and llama.h, which nothing documents: they are looked for,
and llama-cpp-python's library is the second choice. No compiler is needed for either.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UnavailableError
from pipeline.installed import version

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_PLACES = (("xllamacpp", "xllamacpp*.so"), ("xllamacpp", "xllamacpp*.pyd"), ("llama_cpp", "lib/libllama.*"))
"""Python package, and where in it the library may be, the best first."""
_BESIDE = ("libggml-base", "libggml")
"""Libraries of their own that hold ggml's symbols where the first one does not."""
NEEDED = ("ggml_quantize_chunk", "ggml_quantize_init", "ggml_row_size", "ggml_validate_row_data")


@cache
def quantizer() -> Any:
    """The library with `ggml_quantize_chunk`. UnavailableError that says where it was looked for."""
    tried = []
    for path in libraries():
        for each in (path, *(p for name in _BESIDE for p in sorted(path.parent.glob(f"{name}.*")))):
            try:
                library = ctypes.CDLL(str(each))
            except OSError as error:
                tried.append(f"{each.name}: {error}")
                continue
            missing = [name for name in NEEDED if not hasattr(library, name)]
            if not missing:
                return _typed(library)
            tried.append(f"{each.name} does not export {missing[0]}")
    raise UnavailableError(
        "no prebuilt llama.cpp library with its quantization functions is installed"
        + "".join(f"\n  {line}" for line in tried),
        hint="pip install 'enginewright[gguf]'; llama-cpp-python does as well",
    )


def libraries() -> Iterator[Path]:
    """Prebuilt llama.cpp libraries that are installed here, the preferred first. Nothing is imported."""
    for package, pattern in _PLACES:
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            continue
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            yield from sorted(Path(folder).glob(pattern))


def installed() -> str:
    """Distribution that brings the library: the one whose version belongs into keys."""
    for package, distribution in (("xllamacpp", "xllamacpp"), ("llama_cpp", "llama_cpp_python")):
        if version(distribution) and importlib.util.find_spec(package):
            return distribution
    return "xllamacpp"


def _typed(library: Any) -> Any:
    size, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.restype = size
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    library.ggml_row_size.restype = size
    library.ggml_row_size.argtypes = [ctypes.c_int, number]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, size]
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    return library


def quantize(
    library: Any, kind: int, rows: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.uint8]:
    """Rows [rows, columns] float32 as rows [rows, bytes] of the ggml type `kind`; `importance` is [columns] float32.

    The interpreter is free while it runs. Raises ValueError when llama.cpp finds its own result invalid.
    """
    import numpy as np

    rows = np.ascontiguousarray(rows, np.float32)
    count, columns = rows.shape
    out = np.empty((count, library.ggml_row_size(kind, columns)), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    written = library.ggml_quantize_chunk(kind, rows.ctypes.data, out.ctypes.data, 0, count, columns, weights)
    if written != out.nbytes or not library.ggml_validate_row_data(kind, out.ctypes.data, out.nbytes):
        raise ValueError(f"llama.cpp wrote {written} bytes where {out.nbytes} belong, or invalid ones")
    return out
