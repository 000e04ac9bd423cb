"""The Engine over TensorRT on a GPU: buffers in torch, a stream of its own, dynamic shapes, caches in place.

The same code runs TensorRT 10, 11 and TensorRT-RTX. What it needs of the library is an engine and an execution context;
tests give it one that computes in torch on a CPU.

Legend: B rows, S tokens fed at once, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engine import Array, Engine, Sampling, Token
from pipeline.errors import RecipeError, StageError, UnavailableError
from pipeline.targets.ort_decoder import Shape
from pipeline.targets.static_decoder import StaticDecoder
from pipeline.targets.trt_plan import open_plan

_PREFILL, _DECODE = 0, 1
_TORCH = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


def open_engine(folder: Path, settings: Mapping[str, Any] | None = None) -> Engine:
    """An Engine over the plan of an engine's folder or an artifact. Errors as of `open_plan`; UnavailableError where
    torch has no CUDA."""
    trt, engine, about = open_plan(folder)
    import torch

    if not torch.cuda.is_available():
        raise UnavailableError(
            "this torch has no CUDA, and buffers on the GPU are torch's", hint="install a torch that is built for CUDA"
        )
    return engine_over(trt, engine, about, "cuda")


def engine_over(trt: Any, engine: Any, about: Mapping[str, Any], device: str) -> Engine:
    """An Engine over a deserialized plan. StageError where its tensors are not those of engine.json."""
    session = Session(trt, engine, device)
    if about["kind"] == "decoder":
        return StaticDecoder(_GpuStatic(session, about["settings"]["profiles"]), Shape.read(about["decoder"]))
    wanted = {port["name"] for kind in ("inputs", "outputs") for port in about["interface"][kind]}
    if missing := sorted(wanted - {*session.inputs, *session.outputs}):
        raise StageError(f"the plan has no tensor '{missing[0]}', which engine.json names", hint="build it again")
    return _GpuModel(session)


class Session:
    """An execution context with its stream. Tensors go in and come out as torch tensors on the device."""

    def __init__(self, trt: Any, engine: Any, device: str) -> None:
        import torch

        self.trt, self.engine, self.device = trt, engine, device
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = tuple(name for name in names if is_input[name])
        self.outputs = tuple(name for name in names if not is_input[name])
        self.dtypes = {name: getattr(torch, _TORCH[engine.get_tensor_dtype(name).name]) for name in names}
        self.aliases = {name: self._alias(name) for name in self.outputs}
        self.context = engine.create_execution_context()
        if self.context is None:
            raise StageError("no execution context: the GPU's memory may be full", hint="free some of it")
        self.stream = torch.cuda.Stream() if device == "cuda" else None
        self.profile = 0

    def _alias(self, output: str) -> str:
        """The input whose memory an output shares; "" for an output of its own. Known from 10.15 on."""
        ask = getattr(self.engine, "get_aliased_input_tensor", None)
        return str(ask(output) or "") if ask else ""

    def use_profile(self, index: int) -> None:
        """Switch to an optimization profile, before its shapes are set."""
        if index != self.profile:
            self.context.set_optimization_profile_async(index, self._handle)
            self.profile = index

    @property
    def _handle(self) -> int:
        return int(self.stream.cuda_stream) if self.stream is not None else 0

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """One pass over tensors of the device in the types of the engine. Outputs that share an input's memory are
        that input; StageError when a shape is outside of the profile or the pass fails."""
        import torch

        with self._streaming():
            for name, tensor in inputs.items():
                if not self.context.set_input_shape(name, tuple(tensor.shape)):
                    raise StageError(
                        f"input '{name}' has shape {list(tensor.shape)}, outside of the engine's profile",
                        hint="see `profiles` in engine.json; build with a wider `batch` or `sequence`",
                    )
                self.context.set_tensor_address(name, tensor.data_ptr())
            if waiting := self.context.infer_shapes():
                raise StageError(f"input '{waiting[0]}' is missing", hint="see the artifact's interface")
            found: dict[str, Any] = {}
            for name in self.outputs:
                alias = self.aliases[name]
                if alias:
                    found[name] = inputs[alias]
                else:
                    shape = tuple(self.context.get_tensor_shape(name))
                    found[name] = torch.empty(shape, dtype=self.dtypes[name], device=self.device)
                self.context.set_tensor_address(name, found[name].data_ptr())
            if not self.context.execute_async_v3(self._handle):
                raise StageError("TensorRT could not start the pass", hint="the log has its reason")
            if self.stream is not None:
                self.stream.synchronize()
        return {name: found[name] for name in outputs}

    @contextmanager
    def _streaming(self) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        import torch

        self.stream.wait_stream(torch.cuda.current_stream())  # the inputs were made there
        with torch.cuda.stream(self.stream):
            yield

    def tensor(self, name: str, array: Array) -> Any:
        """An array in the type of an input, where the engine reads it: on the device, or on the host for a shape."""
        import torch

        place = "cpu" if self.engine.is_shape_inference_io(name) else self.device
        return torch.as_tensor(np.ascontiguousarray(array)).to(device=place, dtype=self.dtypes[name])


def _array(tensor: Any) -> Array:
    import torch

    found: Array = (tensor.to(torch.float32) if tensor.is_floating_point() else tensor).cpu().numpy()
    return found


class _GpuModel:
    """The Engine of everything that answers in one pass."""

    _DEFAULTS: Mapping[str, Any] = {"attention_mask": np.ones_like, "token_type_ids": np.zeros_like}

    def __init__(self, session: Session) -> None:
        self._session = session

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs of the artifact's interface in, its outputs out, floats as float32."""
        feeds = dict(inputs)
        for name, default in self._DEFAULTS.items():
            if name in self._session.inputs and name not in feeds and "input_ids" in feeds:
                feeds[name] = default(feeds["input_ids"])
        if set(feeds) != set(self._session.inputs):
            raise RecipeError(
                f"the engine takes {', '.join(self._session.inputs)}; given: {', '.join(inputs) or 'nothing'}",
                hint="see the artifact's interface: `enginewright inspect`",
            )
        given = {name: self._session.tensor(name, value) for name, value in feeds.items()}
        found = self._session.run(given, self._session.outputs)
        return {name: _array(tensor) for name, tensor in found.items()}

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Token]:
        """Refused: there is no text to generate."""
        raise UnavailableError("this engine does not generate text", hint="use `run`: it answers in one forward pass")


class _GpuStatic:
    """A decoder's graph: profile 0 reads prompts, profile 1 decodes."""

    def __init__(self, session: Session, profiles: Sequence[Mapping[str, Any]]) -> None:
        self.session = session
        _, _, largest = profiles[_PREFILL]["input_ids"]
        self.largest_batch, self.chunk = int(largest[0]), int(largest[1])
        self.caches = {name: tuple(map(int, s[2][1:])) for name, s in profiles[0].items() if name.startswith("past")}

    def buffers(self, batch: int) -> _GpuBuffers:
        return _GpuBuffers(self, batch)


class _GpuBuffers:
    def __init__(self, owner: _GpuStatic, batch: int) -> None:
        import torch

        self.session = owner.session
        self.names = {name: name.replace("past_key_values.", "present.", 1) for name in owner.caches}
        self.caches = {
            name: torch.zeros((batch, *shape), dtype=self.session.dtypes[name], device=self.session.device)
            for name, shape in owner.caches.items()
        }

    def forward(self, ids_BS: Array, places_B: Array) -> Array:
        self.session.use_profile(_DECODE if ids_BS.shape[1] == 1 else _PREFILL)
        fed = {
            "input_ids": self.session.tensor("input_ids", ids_BS),
            "write_indices": self.session.tensor("write_indices", places_B),
        }
        found = self.session.run({**fed, **self.caches}, ("logits", *self.names.values()))
        self.caches = {name: found[present] for name, present in self.names.items()}
        return _array(found["logits"])

    def reorder(self, rows: Sequence[int]) -> None:
        self.caches = {name: cache[list(rows)].contiguous() for name, cache in self.caches.items()}

    def put(self, row: int, other: _GpuBuffers) -> None:
        for name, cache in self.caches.items():
            cache[row].copy_(other.caches[name][0])
