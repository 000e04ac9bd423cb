"""llama.h by ctypes: open a GGUF file, tokenize, and run it. For the child process alone: ggml aborts on what it
does not like, and takes the whole process with it.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import RecipeError, StageError, UnavailableError
from pipeline.stages.gguf.native import libraries

if TYPE_CHECKING:
    from pipeline.engine import Array

_ROOM = 512
"""Bytes after the fields that are known: a later llama.h may append some, and these structs go by value."""
_KV = {"F32": 0, "F16": 1}
_BLOCK = 256
"""What llama.cpp rounds a context to."""


class _ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", c_void_p), ("tensor_buft_overrides", c_void_p), ("n_gpu_layers", c_int32), ("split_mode", c_int32),
        ("load_mode", c_int32), ("lazy_mode", c_int32), ("main_gpu", c_int32), ("tensor_split", c_void_p),
        ("progress_callback", c_void_p), ("progress_callback_user_data", c_void_p), ("kv_overrides", c_void_p),
        ("vocab_only", c_bool), ("check_tensors", c_bool), ("use_extra_bufts", c_bool), ("no_host", c_bool),
        ("no_alloc", c_bool), ("load_mtp", c_bool), ("room", c_int8 * _ROOM),
    )  # fmt: skip


@cache
def _context_params(more: int) -> type[ctypes.Structure]:
    """llama_context_params with `more` pointers before its booleans: llama.cpp 0.6 has one that 0.5 does not have."""

    class ContextParams(ctypes.Structure):
        _fields_ = (
            ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32),
            ("n_rs_seq", c_uint32), ("n_outputs_max", c_uint32), ("n_outputs_max_per_seq", c_uint32),
            ("n_threads", c_int32), ("n_threads_batch", c_int32), ("ctx_type", c_int32),
            ("rope_scaling_type", c_int32), ("pooling_type", c_int32), ("attention_type", c_int32),
            ("flash_attn_type", c_int32), ("rope_freq_base", c_float), ("rope_freq_scale", c_float),
            ("yarn_ext_factor", c_float), ("yarn_attn_factor", c_float), ("yarn_beta_fast", c_float),
            ("yarn_beta_slow", c_float), ("yarn_orig_ctx", c_uint32), ("defrag_thold", c_float),
            ("cb_eval", c_void_p), ("cb_eval_user_data", c_void_p), ("type_k", c_int32), ("type_v", c_int32),
            ("abort_callback", c_void_p), ("abort_callback_data", c_void_p), ("more", c_void_p * more),
            ("embeddings", c_bool), ("offload_kqv", c_bool), ("no_perf", c_bool), ("op_offload", c_bool),
            ("swa_full", c_bool), ("kv_unified", c_bool), ("samplers", c_void_p), ("n_samplers", c_size_t),
            ("ctx_other", c_void_p), ("room", c_int8 * _ROOM),
        )  # fmt: skip

    return ContextParams


_LAYOUTS = (1, 0)
"""Values of `more` that are known, the newest first."""
_KNOWN_CONTEXT = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1, "flash_attn_type": -1,
    "yarn_ext_factor": -1.0, "yarn_beta_slow": -1.0, "defrag_thold": -1.0, "type_k": 1, "type_v": 1,
    "embeddings": False, "offload_kqv": True, "no_perf": True, "swa_full": True, "kv_unified": False,
}  # fmt: skip
_KNOWN_MODEL = {"n_gpu_layers": -1, "split_mode": 1, "main_gpu": 0, "vocab_only": False, "use_extra_bufts": True}
"""Defaults of llama.h as the fields above have them: another library puts other values into these places."""


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", c_void_p), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    )  # fmt: skip


def load() -> Any:
    """The library with llama.h's functions. UnavailableError where none is installed or it is of another llama.h."""
    tried = []
    for path in libraries():
        for more in _LAYOUTS:
            try:
                library = ctypes.CDLL(str(path))
                _declare(library, _context_params(more))
            except (OSError, AttributeError) as error:
                tried.append(f"{path.name}: {error}")
                break
            strange = [
                *_strange(library.llama_context_default_params(), _KNOWN_CONTEXT),
                *_strange(library.llama_model_default_params(), _KNOWN_MODEL),
            ]
            if not strange:
                library.llama_backend_init()
                return library
            tried.append(f"{path.name} is of another llama.h: {strange[0]}")
    raise UnavailableError(
        "no llama.cpp library is installed that this version can drive" + "".join(f"\n  {line}" for line in tried),
        hint="pip install 'enginewright[gguf]'",
    )


def _strange(found: Any, known: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {getattr(found, name)}, not {value}"
        for name, value in known.items()
        if getattr(found, name) != value
    ]


def _declare(library: Any, context_params: type[ctypes.Structure]) -> None:
    declared: dict[str, tuple[Any, list[Any]]] = {
        "llama_backend_init": (None, []),
        "llama_model_default_params": (_ModelParams, []),
        "llama_context_default_params": (context_params, []),
        "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
        "llama_init_from_model": (c_void_p, [c_void_p, context_params]),
        "llama_model_get_vocab": (c_void_p, [c_void_p]),
        "llama_vocab_n_tokens": (c_int32, [c_void_p]),
        "llama_n_ctx": (c_uint32, [c_void_p]),
        "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
        "llama_get_memory": (c_void_p, [c_void_p]),
        "llama_memory_clear": (None, [c_void_p, c_bool]),
        "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
        "llama_memory_seq_cp": (None, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
        "llama_decode": (c_int32, [c_void_p, _Batch]),
        "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
        "llama_free": (None, [c_void_p]),
    }
    for name, (result, arguments) in declared.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


class Llama:
    """A GGUF file that llama.cpp has opened."""

    def __init__(self, file: Path, *, kv: str, threads: int, gpu_layers: int, vocab_only: bool = False) -> None:
        self._library = load()
        parameters = self._library.llama_model_default_params()
        parameters.n_gpu_layers = gpu_layers
        parameters.vocab_only = vocab_only
        self._model = self._library.llama_model_load_from_file(str(file).encode(), parameters)
        if not self._model:
            raise StageError(f"llama.cpp does not load {file.name}", hint="see what it says below")
        self._vocab = self._library.llama_model_get_vocab(self._model)
        self.vocab_size = int(self._library.llama_vocab_n_tokens(self._vocab))
        self._kv, self._threads = _KV[kv], threads
        self._context: Any = None
        self._size = (0, 0)
        self._turn = 0
        self._sequences: list[int] = []
        self._lengths: list[int] = []

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids; special tokens in the text are read as such, and `special` adds bos and eos as the file says."""
        data = text.encode()
        room = len(data) + 16
        ids = (c_int32 * room)()
        count = self._library.llama_tokenize(self._vocab, data, len(data), ids, room, special, True)
        if count < 0:
            raise StageError(f"llama.cpp cannot tokenize {text[:60]!r}")
        return list(ids[:count])

    def run(self, ids: Sequence[int]) -> Array:
        """Logits [T, V] of every position of one sequence."""
        self._turn = 0  # no batch goes on after this
        self._open(len(ids), 1)
        return self._decode(ids, range(len(ids)), [0] * len(ids), [True] * len(ids))

    def prefill(self, prompts: Sequence[Sequence[int]], room: int, rows: int, turn: int, tokens: int = 0) -> Array:
        """Begin a batch: logits [B, V] after each prompt. At most `rows` rows of `room` more tokens will follow, or as
        many as `tokens` leaves room for where that is given.

        `turn` is the caller's number of the batch, by which `extend` and `step` know it.
        """
        self._turn = turn
        self._open(tokens or sum(map(len, prompts)) + rows * room, rows)
        self._sequences, self._lengths = [], []
        self._rows = rows
        return self.extend(prompts, turn)

    def extend(self, prompts: Sequence[Sequence[int]], turn: int) -> Array:
        """More prompts for the batch: logits [B, V] after each of them. Their rows follow those that are there."""
        self._mine(turn)
        free = [sequence for sequence in range(self._rows) if sequence not in self._sequences]
        last = []
        for sequence, ids in zip(free, prompts, strict=False):
            at_end = [at == len(ids) - 1 for at in range(len(ids))]
            last.append(self._decode(ids, range(len(ids)), [sequence] * len(ids), at_end))
            self._sequences.append(sequence)
            self._lengths.append(len(ids))
        if len(last) < len(prompts):
            raise StageError(f"{len(prompts)} more prompts do not fit a batch of {self._rows} sequences")
        return np.concatenate(last)

    def step(self, tokens: Sequence[int], rows: Sequence[int], turn: int) -> Array:
        """One token a row: logits [B, V]. The new row i continues the old row rows[i]."""
        self._mine(turn)
        memory = self._library.llama_get_memory(self._context)
        kept = {self._sequences[row] for row in rows}
        for sequence in self._sequences:
            if sequence not in kept:
                self._library.llama_memory_seq_rm(memory, sequence, -1, -1)
        free = [sequence for sequence in range(self._rows) if sequence not in kept]
        taken: set[int] = set()
        sequences, lengths = [], []
        for row in rows:
            sequence = self._sequences[row]
            if sequence in taken:
                copy = free.pop()
                self._library.llama_memory_seq_cp(memory, sequence, copy, -1, -1)
                sequence = copy
            taken.add(sequence)
            sequences.append(sequence)
            lengths.append(self._lengths[row])
        logits = self._decode(tokens, lengths, sequences, [True] * len(tokens))
        self._sequences, self._lengths = sequences, [length + 1 for length in lengths]
        return logits

    def _mine(self, turn: int) -> None:
        if turn != self._turn:
            raise StageError("another request has taken the engine's cache", hint="finish one generation first")

    def _open(self, tokens: int, rows: int) -> None:
        """A context for so many tokens, empty. One that is large enough is used again."""
        size = -(-tokens // _BLOCK) * _BLOCK
        if self._context and self._size[0] >= size and self._size[1] == rows:
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
            return
        if self._context:
            self._library.llama_free(self._context)
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = size
        parameters.n_seq_max, parameters.kv_unified = rows, True
        parameters.n_outputs_max = parameters.n_outputs_max_per_seq = 0
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.type_k = parameters.type_v = self._kv
        if self._kv == _KV["F32"]:
            # Flash attention on a CPU rounds to half precision: a mean divergence of 4e-8 instead of 1e-12.
            parameters.flash_attn_type = 0
        self._context = self._library.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise StageError(f"llama.cpp has no room for a context of {size} tokens", hint="see what it says below")
        if self._library.llama_n_ctx(self._context) < tokens:
            raise RecipeError(f"llama.cpp opens {self._library.llama_n_ctx(self._context)} tokens, not {tokens}")
        self._size = (size, rows)

    def _decode(
        self, ids: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wanted: Sequence[bool]
    ) -> Array:
        count = len(ids)
        each = [(c_int32 * 1)(sequence) for sequence in sequences]
        batch = _Batch(
            count,
            (c_int32 * count)(*ids),
            None,
            (c_int32 * count)(*positions),
            (c_int32 * count)(*([1] * count)),
            (POINTER(c_int32) * count)(*(ctypes.cast(one, POINTER(c_int32)) for one in each)),
            (c_int8 * count)(*map(int, wanted)),
        )
        code = self._library.llama_decode(self._context, batch)
        if code:
            raise StageError(f"llama_decode of {count} tokens gave {code}", hint="see what llama.cpp says below")
        out = np.empty((sum(wanted), self.vocab_size), np.float32)
        for row, place in enumerate(place for place, want in enumerate(wanted) if want):
            pointer = self._library.llama_get_logits_ith(self._context, place)
            if not pointer:
                raise StageError(f"llama.cpp has no logits of token {place}")
            out[row] = np.ctypeslib.as_array(pointer, (self.vocab_size,))
        return out
