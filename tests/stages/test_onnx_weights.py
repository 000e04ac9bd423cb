"""Weights at every precision: kernels against numpy, engines against engines with the dequantized weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from pipeline.errors import RecipeError, StageError, UnavailableError
from pipeline.stages.onnx import weights as onnx_weights
from pipeline.stages.onnx.nbits import dequantize, quantize
from pipeline.stages.onnx.sink import EMBED_BYTES, Sink
from pipeline.stages.onnx.weights import WeightOptions
from pipeline.step import silent
from tests.conftest import ROOT
from tests.stages.decoders import SIZES, engine, export, session, step, write_decoder

PLAIN = {"head": "same", "embeddings": "keep", "algorithm": "rtn"}


def weight(n: int, k: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((n, k), dtype=np.float32)


# the numbers


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_those_of_onnxruntime(bits: int, symmetric: bool) -> None:
    from onnxruntime.capi import _pybind_state as state

    n, k, group = 48, 256, 32
    x = weight(n, k)
    blocks = k // group
    packed, scales = np.zeros((n, blocks, group * bits // 8), np.uint8), np.zeros(n * blocks, np.float32)
    zeros = np.zeros(n * (blocks * bits // 8), np.uint8)
    kernel = state.quantize_matmul_4bits if bits == 4 else state.quantize_matmul_8bits
    kernel(packed, np.ascontiguousarray(x.T), scales, zeros, group, n, k, symmetric)
    ours = quantize(x, bits, group, symmetric=symmetric)
    assert np.array_equal(ours.scales, scales.reshape(n, blocks))
    # Halves between two codes are rounded to even here and away from zero there.
    assert (ours.packed == packed).mean() > 0.999
    if not symmetric:
        assert ours.zeros is not None and (ours.zeros.reshape(-1) == zeros).mean() > 0.99


@pytest.mark.parametrize("k", [64, 80, 96])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_value_is_off_by_half_a_step(bits: int, symmetric: bool, k: int) -> None:
    x = weight(20, k)
    x[3] = 0
    quantized = quantize(x, bits, 32, symmetric=symmetric)
    steps = np.repeat(np.abs(quantized.scales), 32, axis=1)[:, :k]
    limit = 1.0 if symmetric else 0.5  # the end of the range opposite to the largest value has no code of its own
    assert (np.abs(dequantize(quantized, bits, 32, k) - x) <= limit * steps + 1e-6).all()
    assert (dequantize(quantized, bits, 32, k)[3] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_lowers_the_weighted_error(symmetric: bool) -> None:
    x = weight(64, 512) ** 3

    def error(algorithm: Any) -> float:
        quantized = quantize(x, 4, 32, symmetric=symmetric, algorithm=algorithm)
        return float((x**2 * (dequantize(quantized, 4, 32, 512) - x) ** 2).sum())

    assert error("k_quant") < 0.9 * error("rtn")


@pytest.mark.parametrize("group", [16, 32, 128, 256])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_kernel_multiplies_with_what_numpy_dequantizes(bits: int, symmetric: bool, group: int) -> None:
    import onnxruntime

    n, k = 24, 272
    quantized = quantize(weight(n, k), bits, group, symmetric=symmetric)
    names = ["B", "scales", "zeros"][: 2 + (quantized.zeros is not None)]
    parts = [part for part in quantized if part is not None]
    constants = [numpy_helper.from_array(part, name) for name, part in zip(names, parts, strict=True)]
    node = helper.make_node(
        "MatMulNBits", ["A", *names], ["Y"], domain="com.microsoft", K=k, N=n, bits=bits, block_size=group
    )
    ends = [helper.make_tensor_value_info(name, 1, None) for name in ("A", "Y")]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    run = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for rows in (1, 9):  # decode and prefill use different kernels
        a = weight(rows, k, 1)
        wanted = a @ dequantize(quantized, bits, group, k).T
        assert np.abs(run.run(None, {"A": a})[0] - wanted).max() < 2e-3


# engines


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("llama") / "model", "Llama", tie_word_embeddings=True, vocab_size=2048)


@pytest.fixture(scope="module")
def exported(llama: Path) -> Path:
    return export(llama, llama.parent / "export")


IDS = np.random.default_rng(0).integers(5, 320, (2, 24))


def logits(folder: Path) -> Any:
    return step(session(folder), IDS, np.ones_like(IDS))[0]


def kld(wanted: Any, found: Any) -> float:
    def log_softmax(x: Any) -> Any:
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(wanted), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"precision": "fp16"}, 1e-4),
        ({"precision": "int8"}, 4e-3),
        ({"precision": "int8", "group_size": 64, "symmetric": True}, 6e-3),
        ({"precision": "int4"}, 0.3),
        ({"precision": "int4", **PLAIN}, 0.6),
        ({"precision": "int8", "activations": "fp16"}, 6e-3),
        ({"precision": "int4", "activations": "fp16", "accuracy_level": 0}, 0.3),
        ({"precision": "int4", "algorithm": "k_quant_mixed", "embeddings": "same", "head": "fp32"}, 0.6),
        ({"precision": "int4", "symmetric": True, "embeddings": "int4", "head": "same"}, 0.6),
    ],
)
def test_engines_load_and_stay_close(
    llama: Path, exported: Path, tmp_path: Path, options: dict[str, Any], limit: float
) -> None:
    exact = engine(llama, tmp_path / "exact", exported)
    folder = engine(llama, tmp_path / "engine", exported, **options)
    onnx.checker.check_model(folder / "model.onnx")
    wanted, found = logits(exact), logits(folder)
    assert kld(wanted, found) < limit
    # Decoding agrees with prefill, through another kernel.
    run = session(folder)
    ones = np.ones_like(IDS)
    _, past = step(run, IDS[:, :-1], ones[:, :-1])
    last, _ = step(run, IDS[:, -1:], ones, past)
    assert kld(found[:, -1], last[:, 0]) < max(limit / 10, 1e-5)
    said = json.loads((folder / "engine.json").read_text())
    assert said["precision"] == options["precision"] and said["runtime"] == "onnxruntime"
    assert (said["quantization"] is None) == (options["precision"] == "fp16")


def test_an_int4_engine_computes_with_the_dequantized_weights(llama: Path, exported: Path, tmp_path: Path) -> None:
    """Two roads to the same numbers: MatMulNBits here, fp32 products of weights that numpy dequantized there."""
    from safetensors.numpy import load_file, save_file

    folder = engine(llama, tmp_path / "engine", exported, precision="int4", accuracy_level=0, **PLAIN)
    model = tmp_path / "model"
    model.mkdir()
    tensors = load_file(llama / "model.safetensors")
    for name, values in tensors.items():
        if name.endswith("proj.weight"):
            tensors[name] = dequantize(quantize(values, 4, 32, symmetric=False), 4, 32, values.shape[1])
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = dequantize(quantize(embedding, 4, 32, symmetric=False), 4, 32, embedding.shape[1])
    save_file(tensors, model / "model.safetensors")
    for path in llama.glob("*.json"):
        (model / path.name).write_text(
            path.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
        )
    other = engine(model, tmp_path / "other")
    assert np.abs(logits(folder) - logits(other)).max() < 2e-3


def test_shards_and_stored_types_make_no_difference(tmp_path: Path) -> None:
    one = write_decoder(tmp_path / "one", "Qwen2", dtype="bfloat16")
    many = write_decoder(tmp_path / "many", "Qwen2", dtype="bfloat16", shard="50KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    for precision in ("fp32", "int4"):
        first = engine(one, tmp_path / f"one-{precision}", precision=precision)
        second = engine(many, tmp_path / f"many-{precision}", precision=precision)
        assert np.array_equal(logits(first), logits(second))


def test_equal_inputs_give_equal_bytes(llama: Path, exported: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "fp16", "int8", "int4"):
        one = engine(llama, tmp_path / f"a-{precision}", exported, precision=precision)
        two = engine(llama, tmp_path / f"b-{precision}", exported, precision=precision)
        assert {path.name: path.read_bytes() for path in one.iterdir()} == {
            path.name: path.read_bytes() for path in two.iterdir()
        }


def initializers(folder: Path) -> dict[str, Any]:
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    return {tensor.name: tensor for tensor in proto.graph.initializer}


def test_a_tied_table_is_stored_once(llama: Path, exported: Path, tmp_path: Path) -> None:
    for options in ({"precision": "fp32"}, {"precision": "int8"}, {"precision": "int4"}):
        tensors = initializers(engine(llama, tmp_path / options["precision"], exported, **options))
        large = [name for name, tensor in tensors.items() if 2048 in tensor.dims and len(tensor.raw_data) >= 2048 * 64]
        assert len(large) == 1, large


def test_a_table_that_is_only_looked_up_keeps_its_sixteen_bits(tmp_path: Path) -> None:
    model = write_decoder(tmp_path / "model", "Llama", dtype="bfloat16", vocab_size=2048)
    folder = engine(model, tmp_path / "engine")
    assert initializers(folder)["model.embed_tokens.weight"].data_type == onnx.TensorProto.BFLOAT16
    assert initializers(folder)["lm_head.weight"].data_type == onnx.TensorProto.FLOAT
    assert np.isfinite(logits(folder)).all()


def test_query_key_and_value_are_one_product(llama: Path, exported: Path, tmp_path: Path) -> None:
    folder = engine(llama, tmp_path / "engine", exported)
    proto = onnx.load(folder / "model.onnx")
    assert sum(node.op_type == "FusedMatMul" for node in proto.graph.node) == 2 * 5 + 1
    mixed = engine(llama, tmp_path / "mixed", exported, precision="int4", algorithm="k_quant_mixed")
    said = json.loads((mixed / "engine.json").read_text())["quantization"]
    # Layer 1 of 2 is an outer one: its values and its down projection have 8 bits, so has the head.
    assert said["tensors"]["int8"] == 3 and said["method"] == "k_quant_mixed"


def test_what_engine_json_says_of_the_weights(llama: Path, exported: Path, tmp_path: Path) -> None:
    folder = engine(llama, tmp_path / "engine", exported, precision="int4", head="same", embeddings="same")
    said = json.loads((folder / "engine.json").read_text())["quantization"]
    assert said["format"] == "MatMulNBits" and said["group_size"] == 32 and not said["symmetric"]
    # 4 bits, and 32 for the scale and 4 for the zero point of every 32 weights; the norms are small.
    assert said["bits_per_weight"] == pytest.approx(5.17, abs=0.02)


def test_products_can_be_left_alone(llama: Path, exported: Path, tmp_path: Path) -> None:
    exclude = ("*.down_proj", "model.layers.0.self_attn.v_proj.weight")
    folder = engine(llama, tmp_path / "engine", exported, precision="int4", exclude=exclude)
    proto = onnx.load(folder / "model.onnx")
    left = {node.name for node in proto.graph.node if node.op_type == "FusedMatMul"}
    assert left == {
        "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.v_proj",
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"'\*\.dwon_proj' matches no matrix product") as caught:
        engine(llama, tmp_path / "typo", exported, precision="int4", exclude=("*.dwon_proj",))
    assert "model.layers.0.self_attn.q_proj" in caught.value.hint


def test_group_sizes(llama: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="group_size is 48"):
        engine(llama, tmp_path / "48", exported, precision="int4", group_size=48)
    with pytest.raises(RecipeError, match=r"width 64 .* no multiple of group_size 128") as caught:
        engine(llama, tmp_path / "128", exported, precision="int4", group_size=128)
    assert "embeddings: keep" in caught.value.hint
    folder = engine(llama, tmp_path / "kept", exported, precision="int4", group_size=128, embeddings="keep")
    assert np.isfinite(logits(folder)).all()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_weight_that_is_not_a_number_is_named(tmp_path: Path, precision: str) -> None:
    from safetensors.numpy import load_file, save_file

    model = write_decoder(tmp_path / "model", "Llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 6] = np.nan
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(StageError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' holds nan at \[5, 6\]"):
        engine(model, tmp_path / "engine", precision=precision)


def test_weights_beyond_fp16_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model = write_decoder(tmp_path / "model", "Llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 6] = 1e5
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(UnavailableError, match=r"beyond fp16.s range"):
        engine(model, tmp_path / "engine", precision="fp16")


def test_a_model_folder_that_changed_since_the_export(llama: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"model\.safetensors, which is not there"):
        onnx_weights.run({"model": tmp_path, "export": exported}, WeightOptions(), tmp_path, silent)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(StageError, match="ends before initializer"):
        onnx_weights.run({"model": tmp_path, "export": exported}, WeightOptions(), tmp_path, silent)


# graphs of other exporters


def plain_graph(folder: Path, external: bool) -> dict[str, Any]:
    """A little language model as torch exports it: [K, N] products, a tied head behind a Transpose, a Gemm."""
    folder.mkdir()
    values = {
        "embed": weight(1200, 64, 1),
        "up": weight(64, 96, 2),
        "down": weight(96, 64, 3),
        "bias": weight(1, 64, 4)[0],
    }
    nodes = [
        helper.make_node("Gather", ["embed", "input_ids"], ["x"], name="embedding"),
        helper.make_node("MatMul", ["x", "up"], ["wide"], name="up"),
        helper.make_node("Relu", ["wide"], ["active"]),
        helper.make_node("MatMul", ["active", "down"], ["narrow"], name="down"),
        helper.make_node("Add", ["narrow", "bias"], ["hidden"]),
        helper.make_node("Transpose", ["embed"], ["head"], perm=[1, 0]),
        helper.make_node("MatMul", ["hidden", "head"], ["logits"], name="head"),
    ]
    ids = helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", "sequence"])
    out = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", "sequence", 1200])
    tensors = [numpy_helper.from_array(array, name) for name, array in values.items()]
    graph = helper.make_graph(nodes, "plain", [ids], [out], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=external, location="model.onnx.data")
    said = {
        "exporter": "torch", "task": "text-generation", "kind": "other", "components": {"model": "model.onnx"},
        "interface": {"inputs": [], "outputs": []}, "decoder": None, "pooling": None,
    }  # fmt: skip
    (folder / "export.json").write_text(json.dumps(said))
    return values


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_graphs_with_weights_stored_the_other_way(tmp_path: Path, precision: str, external: bool) -> None:
    values = plain_graph(tmp_path / "export", external)
    (tmp_path / "model").mkdir()
    (tmp_path / "engine").mkdir()
    options = WeightOptions(precision=precision, accuracy_level=0)  # type: ignore[arg-type]
    inputs = {"model": tmp_path / "model", "export": tmp_path / "export"}
    onnx_weights.run(inputs, options, tmp_path / "engine", silent)
    onnx.checker.check_model(tmp_path / "engine" / "model.onnx")
    ids = np.arange(30).reshape(2, 15) * 40
    found = session(tmp_path / "engine").run(None, {"input_ids": ids})[0]
    bits = {"int8": 8, "int4": 4}.get(precision)

    def seen(name: str, transpose: bool, own: int | None = bits) -> Any:
        rows = np.ascontiguousarray(values[name].T) if transpose else values[name]
        if own is None:
            return rows
        return dequantize(quantize(rows, own, 32, symmetric=False), own, 32, rows.shape[1])

    table = seen("embed", False, bits and 8)
    hidden = np.maximum(table[ids] @ seen("up", True).T, 0) @ seen("down", True).T + values["bias"]
    wanted = hidden @ table.T
    assert np.abs(found - wanted).max() < (2e-2 if precision == "fp16" else 1e-4) * np.abs(wanted).max()
    proto = onnx.load(tmp_path / "engine" / "model.onnx", load_external_data=False)
    if bits:
        kinds = [node.op_type for node in proto.graph.node]
        assert kinds.count("MatMulNBits") == 3 and "Transpose" not in kinds and "Add" not in kinds


def test_layers_of_a_graph_without_names(tmp_path: Path) -> None:
    plain_graph(tmp_path / "export", False)
    (tmp_path / "engine").mkdir()
    options = WeightOptions(precision="int4", algorithm="k_quant_mixed")
    with pytest.raises(UnavailableError, match="does not say which product belongs to which layer"):
        onnx_weights.run({"model": tmp_path, "export": tmp_path / "export"}, options, tmp_path / "engine", silent)


# files


def test_large_models_have_one_aligned_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    monkeypatch.setattr("pipeline.stages.onnx.sink.EMBED_BYTES", 1 << 16)
    small = engine(llama, tmp_path / "int4", precision="int4")
    folder = engine(llama, tmp_path / "fp32")
    monkeypatch.undo()
    for each in (small, folder):
        assert {path.name for path in each.glob("*.onnx*")} == {"model.onnx", "model.onnx.data"}
        for tensor in initializers(each).values():
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert not place or (int(place["offset"]) % 4096 == 0 and place["location"] == "model.onnx.data")
        onnx.checker.check_model(each / "model.onnx")
    assert np.array_equal(logits(folder), logits(engine(llama, tmp_path / "one")))


def test_the_sink_notices_what_was_not_written(tmp_path: Path) -> None:
    sink = Sink(tmp_path / "m.onnx")
    sink.declare("a", (4, 2), onnx.TensorProto.FLOAT)
    with pytest.raises(ValueError, match="16 of 32 bytes"), sink:
        sink.write("a", np.ones((2, 2), np.float32))
    with pytest.raises(ValueError, match="declared twice"):
        sink.declare("a", (1,), onnx.TensorProto.FLOAT)
    assert EMBED_BYTES == 128 << 20


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_peak_memory_is_a_small_part_of_the_model(tmp_path: Path, precision: str) -> None:
    """A model of 600 MB in fp32, built in a process of its own."""
    from safetensors.numpy import save_file

    size, layers, vocabulary, wide = 1024, 6, 65536, 4096
    config = {
        **SIZES, "model_type": "llama", "hidden_size": size, "intermediate_size": wide, "num_hidden_layers": layers,
        "vocab_size": vocabulary, "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True,
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (vocabulary, size), "model.norm.weight": (size,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}_layernorm.weight": (size,) for name in ("input", "post_attention")}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (size, size) for name in "qo"}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (size // 4, size) for name in "kv"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (wide, size) for name in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (size, wide)}
    model = tmp_path / "model"
    model.mkdir()
    random = np.random.default_rng(0)
    save_file(
        {name: random.random(shape, np.float32) - 0.5 for name, shape in shapes.items()}, model / "model.safetensors"
    )
    (model / "config.json").write_text(json.dumps(config))
    # VmHWM, for ru_maxrss of a child begins with what its parent had.
    code = (
        "from pathlib import Path; from tests.stages.decoders import engine\n"
        f"engine(Path({str(model)!r}), Path({str(tmp_path / 'engine')!r}), precision={precision!r})\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    total = sum(int(np.prod(shape)) * 4 for shape in shapes.values())
    assert total > 500 << 20
    assert int(done.stdout) << 10 < 200 << 20


# the trained model


PYDOC = ROOT / "recipes" / "models" / "pydoc-llama"


@pytest.mark.skipif(not (PYDOC / "model.safetensors").exists(), reason="the trained model is not here")
def test_quality_on_the_trained_model(tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    text = (ROOT / "recipes" / "data" / "pydoc-heldout.txt").read_text("utf-8")
    ids = np.array(Tokenizer.from_file(str(PYDOC / "tokenizer.json")).encode(text[:20000]).ids[:2048]).reshape(8, 256)
    torch_model = AutoModelForCausalLM.from_pretrained(PYDOC, dtype=torch.float32)
    with torch.no_grad():
        wanted = torch_model(torch.tensor(ids)).logits.numpy()
    exported = export(PYDOC, tmp_path / "export")
    limits = {"fp32": 1e-9, "fp16": 1e-6, "int8": 1e-4, "int4": 2.5e-3}
    for precision, limit in limits.items():
        folder = engine(PYDOC, tmp_path / precision, exported, precision=precision)
        found, _ = step(session(folder), ids, np.ones_like(ids))
        assert kld(wanted, found) < limit, precision
