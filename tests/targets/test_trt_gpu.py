"""Typed graphs and the runner where a GPU is: real device memory, streams and types; on a machine without one, the same
on its CPU.

The graph is computed in torch at the addresses, with the shapes and on the stream that the runner hands to TensorRT. So
all of it but TensorRT's own kernels is run. Where ONNX Runtime has its CUDA provider, that reads the same graphs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.engine import Sampling, completions
from pipeline.errors import UnavailableError
from pipeline.parity.divergence import log_softmax
from pipeline.stages.onnx import torch as onnx_torch
from pipeline.stages.onnx.torch import TorchExportOptions
from pipeline.stages.tensorrt import api as trt_api
from pipeline.stages.tensorrt import decoder as trt_decoder
from pipeline.stages.tensorrt import graph as trt_graph
from pipeline.stages.tensorrt.decoder import StaticOptions
from pipeline.stages.tensorrt.graph import GraphOptions
from pipeline.step import silent
from pipeline.targets import trt_judge, trt_plan, trt_runner
from tests import models
from tests.conftest import ROOT
from tests.targets.torch_graph import DTYPES, TorchGraph

HERE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = {"float16": "HALF", "bfloat16": "BF16", "float32": "FLOAT", "int64": "INT64"}
ENCODERS = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")
DECODERS = ("fp32", "fp16", "bf16", "int4")
LEAST_COSINE = {"fp32": 0.999999, "fp16": 0.9999, "bf16": 0.999, "int8": 0.999, "fp8": 0.99, "int4": 0.999}
LARGEST_KLD = {"fp32": 1e-6, "fp16": 1e-5, "bf16": 2e-3, "int4": 1e-3}


class _Memory:
    """Bytes at an address of the GPU, as CUDA's array interface tells them."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def view(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor over memory that somebody else owns."""
    size = int(np.prod(shape)) * dtype.itemsize
    if HERE == "cuda":
        raw = torch.as_tensor(_Memory(address, size), device="cuda")
    else:
        raw = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


class Context:
    """What TensorRT's execution context does, with torch in the place of its kernels. Caches are written in place."""

    def __init__(self, file: Path) -> None:
        self.graph = TorchGraph(file, HERE)
        self.kinds = {n: DTYPES[t.elem_type] for n, t in {**self.graph.inputs, **self.graph.outputs}.items()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.results: dict[str, torch.Tensor] = {}
        self.profiles: list[int] = [0]
        self.streams: set[int] = set()

    # the execution context

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profiles.append(index)
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.graph.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes: dict[str, int] = {}
        for each, kind in self.graph.inputs.items():
            dims = zip(kind.shape.dim, self.shapes[each], strict=True)
            sizes |= {dim.dim_param: size for dim, size in dims if dim.dim_param}
        return tuple(sizes.get(d.dim_param, d.dim_value) for d in self.graph.outputs[name].shape.dim)

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.add(stream)
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)) if HERE == "cuda" else torch.no_grad():
            feeds = {name: view(self.addresses[name], shape, self.kinds[name]) for name, shape in self.shapes.items()}
            for name, tensor in self.graph(feeds).items():
                assert tensor.dtype == self.kinds[name], name
                view(self.addresses[name], tuple(tensor.shape), tensor.dtype).copy_(tensor)
        return True

    # the engine

    @property
    def num_io_tensors(self) -> int:
        return len(self.kinds)

    def get_tensor_name(self, index: int) -> str:
        return [*self.kinds][index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.graph.inputs else "out"

    def get_tensor_dtype(self, name: str) -> Any:
        return type("Kind", (), {"name": NAMES[str(self.kinds[name]).removeprefix("torch.")]})

    def get_aliased_input_tensor(self, name: str) -> str:
        return name.replace("present.", "past_key_values.") if name.startswith("present.") else ""

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def create_execution_context(self) -> Context:
        return self


class Library:
    """The names of TensorRT that the runner uses."""

    class TensorIOMode:
        INPUT = "in"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Inputs of the stage of typed graphs: a random BERT, and the trained Llama with a static cache."""
    encoder, decoder = tmp_path_factory.mktemp("encoder"), tmp_path_factory.mktemp("decoder")
    models.bert(encoder / "model")
    for place in (encoder / "export", encoder / "calibration", decoder / "export"):
        place.mkdir()
    onnx_torch.run({"model": encoder / "model"}, TorchExportOptions(), encoder / "export", silent)
    (encoder / "calibration" / "data.txt").write_text("\n".join(models.CORPUS * 8))
    model = ROOT / "recipes" / "models" / "pydoc-llama"
    trt_decoder.run({"model": model}, StaticOptions(cache_length=128), decoder / "export", silent)
    return {
        "encoder": {name: encoder / name for name in ("model", "export", "calibration")},
        "decoder": {"model": model, "export": decoder / "export"},
    }


@pytest.fixture(scope="module")
def graphs(exported: dict[str, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(kind: str, precision: Any) -> Path:
        out = tmp_path_factory.mktemp(f"{kind}-{precision}")
        trt_graph.run(exported[kind], GraphOptions(precision=precision, samples=8, length=16), out, silent)
        return out

    return make


def runner(folder: Path) -> tuple[Any, Context]:
    about = trt_plan.read_json(folder / "engine.json")
    context = Context(folder / "model.onnx")
    prefill = {"input_ids": [(1, 1), (2, 32), (4, 64)], "write_indices": [(1,), (2,), (4,)]}
    for name, kind in context.graph.inputs.items():
        if name.startswith("past"):
            prefill[name] = [(rows, *(d.dim_value for d in kind.shape.dim[1:])) for rows in (1, 2, 4)]
    about["settings"] = {"profiles": [prefill, prefill]}
    return trt_runner.engine_over(Library, context, about, HERE), context


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def kld(reference: np.ndarray, candidate: np.ndarray) -> float:
    p, q = (np.asarray(each, np.float64) for each in (log_softmax(reference), log_softmax(candidate)))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def held_out(rows: int, length: int) -> np.ndarray:
    from pipeline.text import load_tokenizer

    tokenizer = load_tokenizer(ROOT / "recipes" / "models" / "pydoc-llama")
    ids = tokenizer.encode((ROOT / "recipes" / "data" / "pydoc-heldout.txt").read_text("utf-8")).ids
    return np.array(ids[: rows * length], np.int64).reshape(rows, length)


@pytest.mark.parametrize("precision", ENCODERS)
def test_an_encoder_through_the_runner(precision: str, graphs: Any) -> None:
    folder = graphs("encoder", precision)
    engine, context = runner(folder)
    ids = np.arange(5, 29).reshape(2, 12)
    found = engine.run({"input_ids": ids})["last_hidden_state"]
    wanted = trt_judge.open_engine(folder).run({"input_ids": ids})["last_hidden_state"]
    assert found.dtype == np.float32
    assert cosine(found, wanted) > LEAST_COSINE[precision]
    assert HERE == "cpu" or 0 not in context.streams  # a stream of its own, not the default one


@pytest.mark.parametrize("precision", DECODERS)
def test_a_decoder_through_the_runner(precision: str, graphs: Any) -> None:
    folder = graphs("decoder", precision)
    engine, context = runner(folder)
    judge = trt_judge.open_engine(folder)
    ids = held_out(3, 96)
    mask = np.ones_like(ids)
    mask[1, :40] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    found, wanted = engine.run(given)["logits"], judge.run(given)["logits"]
    assert kld(wanted[mask == 1], found[mask == 1]) < LARGEST_KLD[precision]
    prompts = [row.tolist() for row in (ids[0, :7], ids[1, :33], ids[2, :1], ids[0, 9:30], ids[1, 3:9])]
    answers = completions(engine, prompts, Sampling(max_new_tokens=16, eos_token_ids=()))
    for prompt, answer in zip(prompts, answers, strict=True):  # each token is the judge's best, or as good as that
        logits = judge.run({"input_ids": np.array([prompt + answer]), "attention_mask": np.ones((1, len(prompt) + 16))})
        steps = log_softmax(logits["logits"][0, len(prompt) - 1 : -1])
        assert (steps.max(-1) - steps[np.arange(16), answer]).max() < (0.2 if precision == "bf16" else 0.02)
    assert {0, 1} <= set(context.profiles)


@pytest.mark.parametrize(
    ("kind", "precision"), [*(("encoder", p) for p in ENCODERS), *(("decoder", p) for p in DECODERS)]
)
def test_onnxruntime_computes_the_same_on_its_cuda_provider(kind: str, precision: str, graphs: Any) -> None:
    import onnxruntime

    if HERE != "cuda" or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs a GPU, and onnxruntime-gpu")
    folder = graphs(kind, precision)
    ids = np.arange(5, 29).reshape(2, 12) if kind == "encoder" else held_out(2, 64)
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    name = "last_hidden_state" if kind == "encoder" else "logits"
    found = trt_judge.open_engine(folder, {"provider": "CUDAExecutionProvider"}).run(given)[name]
    wanted = trt_judge.open_engine(folder).run(given)[name]
    if kind == "encoder":
        assert cosine(found, wanted) > LEAST_COSINE[precision]
    else:
        assert kld(wanted, found) < LARGEST_KLD[precision]


def test_a_plan_for_another_gpu_is_refused_before_the_library_is_loaded(
    graphs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if HERE != "cuda":
        pytest.skip("needs a GPU: the driver says what it is")
    about = trt_plan.read_json(graphs("encoder", "fp16") / "engine.json")
    (tmp_path / "model.plan").write_bytes(b"plan")
    digest = f"sha256:{hashlib.sha256(b'plan').hexdigest()}"
    about["settings"] = {"flavour": "tensorrt-rtx", "plans": {"8.6": "model.plan"}, "digests": {"model.plan": digest}}
    (tmp_path / "engine.json").write_text(json.dumps(about))
    monkeypatch.setattr(trt_api, "load", lambda name: pytest.fail("the library was asked for"))
    major, minor = torch.cuda.get_device_capability()
    with pytest.raises(UnavailableError, match=f"compute capability 8.6, and this GPU has {major}.{minor}"):
        trt_plan.open_plan(tmp_path)
