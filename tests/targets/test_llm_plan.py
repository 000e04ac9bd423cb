"""The targets for LLM folders before anything runs: what is refused and why, and the commands that serve them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import hardware, targets
from pipeline.errors import EnginewrightError
from pipeline.parity.gates import metrics
from pipeline.pin import Locked
from pipeline.plain import from_plain
from pipeline.recipe import Data, Model, Recipe
from pipeline.size import Size
from pipeline.source import Source, SourceFile
from pipeline.step import Step
from pipeline.targets import Job

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, "hidden_size": 512,
    "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 128, "max_position_embeddings": 4096, "torch_dtype": "bfloat16", "eos_token_id": 2,
}  # fmt: skip
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


def planned(
    runtime: str, on: str = "host", config: dict[str, Any] | None = None, weights: int = 0, **options: Any
) -> tuple[Step, ...]:
    """The steps of one target of a recipe with calibration data; the model takes `weights` bytes in fp32."""
    target = targets.load(runtime)
    parsed = from_plain(target.Options, {"runtime": runtime, "hardware": on, **options})
    recipe = Recipe(name="x", model=Model(source="m"), targets={"t": parsed}, calibration=Data(path="c.txt"))
    tokenizer = SourceFile(path="tokenizer.json", size=1, digest="sha256:" + "0" * 64)
    source = Source(uri="m", revision=None, files=(tokenizer,))
    held = {**CONFIG, **(config or {})}
    sources = Locked(model=source, data={"calibration": source}, config=held)
    size = Size(weights, weights // 8, weights // 4)
    job = Job(recipe=recipe, sources=sources, task="text-generation", kind="decoder", config=held, size=size)
    return target.steps(job, "t", parsed, hardware.load(on))


def options_of(steps: tuple[Step, ...], name: str) -> Any:
    return next(step.options for step in steps if step.name == name)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a family that TurboMind lacks": ("turbomind", {"config": MISTRAL}, "TurboMind has no MistralForCausalLM"),
    "an unknown family": ("vllm", {"config": {"model_type": "mamba"}}, "model_type 'mamba'"),
    "int8 for TurboMind": ("turbomind", {"precision": "int8"}, "TurboMind has no W8A8"),
    "fp8 by channel for TurboMind": ("turbomind", {"precision": "fp8"}, "say `block: true`"),
    "fp32 for TurboMind": ("turbomind", {"precision": "fp32"}, "fp16 or bf16, not in fp32"),
    "fp8 in blocks with small heads": (
        "turbomind",
        {"precision": "fp8", "quantize": {"block": True}, "config": {"head_dim": 64, "num_attention_heads": 8}},
        "heads of 64",
    ),
    "AWQ for transformers": ("transformers", {"precision": "int4", "quantize": {"format": "awq"}}, "gptqmodel"),
    "zero points for transformers": (
        "transformers", {"precision": "int4", "quantize": {"symmetric": False}}, "refuses zero points",
    ),
    "groups of 32 as AWQ": (
        "vllm", {"precision": "int4", "quantize": {"format": "awq", "group_size": 32}}, "group_size is 32",
    ),
    "a group that does not divide": (
        "vllm", {"precision": "int4", "config": {"intermediate_size": 1000}}, "no whole groups of 128",
    ),
    "AWQ of 8 bits": ("vllm", {"precision": "int8", "quantize": {"format": "awq"}}, "4-bit weights"),
    "a method of another precision": ("vllm", {"precision": "fp8", "quantize": {"method": "gptq"}}, "quantize.method"),
    "quantizing bf16": ("vllm", {"precision": "bf16", "quantize": {"group_size": 32}}, "does not quantize"),
    "int8 on Blackwell": ("vllm", {"precision": "int8", "on": "b200"}, "compute capability 10.0"),
    "fp8 on Ampere": ("vllm", {"precision": "fp8", "on": "a100"}, "needs compute capability 8.9"),
    "AWQ on a CPU": ("vllm", {"precision": "int4", "device": "cpu", "quantize": {"format": "awq"}}, "on a CPU"),
    "W8A8 in fp32 on a CPU": (
        "vllm", {"precision": "int8", "device": "cpu", "dtype": "fp32", "quantize": {"method": "rtn"}}, "with AMX",
    ),
    "4 bits in fp32 on a CPU": (
        "vllm", {"precision": "int4", "device": "cpu", "dtype": "fp32", "quantize": {"method": "rtn"}}, "dies on the",
    ),
    "4 bits without AVX-512": ("vllm", {"precision": "int4", "device": "cpu", "on": "x86-64-v3"}, "avx512f"),
    "heads that the CPU lacks": ("vllm", {"device": "cpu", "config": {"head_dim": 48}}, "heads of 48"),
    "a KV cache that the model's heads do not allow": (
        "turbomind", {"serve": {"kv_cache": "int4"}, "config": {"head_dim": 64}}, "needs heads of 128",
    ),
    "tp that does not divide the heads": ("vllm", {"serve": {"tp": 3}}, "3 does not divide the model's 4"),
    "tp against KV heads": (
        "turbomind",
        {"serve": {"tp": 4}, "config": {"num_key_value_heads": 3, "num_attention_heads": 12}},
        "model's 3 KV heads",
    ),
    "tp that cuts a group": (
        "vllm", {"precision": "int4", "serve": {"tp": 4}, "config": {"intermediate_size": 640}}, "groups of 128",
    ),
    "pp beyond the layers": ("vllm", {"serve": {"pp": 5}}, "pp: 5"),
    "nodes that do not fit": ("vllm", {"serve": {"tp": 2, "nodes": 3}}, "spread evenly over 3"),
    "nodes without an address": ("turbomind", {"serve": {"tp": 2, "nodes": 2}}, "dist_init_addr"),
    "a rank beyond the nodes": ("turbomind", {"serve": {"node_rank": 1}}, "node_rank"),
    "a context beyond the model's": ("turbomind", {"serve": {"session_len": 5000}}, "max_position_embeddings is 4096"),
    "experts in parallel without any": ("vllm", {"serve": {"expert_parallel": True}}, "no experts"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_engine_cannot_do_is_refused_before_anything_runs(name: str) -> None:
    runtime, told, words = REFUSED[name]
    with pytest.raises(EnginewrightError) as error:
        planned(runtime, **told)
    assert error.value.exit_code in (5, 64)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "field", [{"sesion_len": 4096}, {"kv_cache": "int3"}, {"communicator": "mpi"}, {"dp": 0}, {"session_len": -1},
              {"cache_max_entry_count": 1.5}, {"tp": 0}]
)  # fmt: skip
def test_the_engine_config_is_stricter_than_lmdeploys(field: dict[str, Any], tmp_path: Path) -> None:
    """Each of these LMDeploy 0.18 takes, or drops without a word (but tp 0)."""
    from pipeline.parse import load_recipe

    recipe = {"name": "x", "model": {"source": "m"}, "targets": {"t": {"runtime": "turbomind", "serve": field}}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    with pytest.raises(EnginewrightError) as error:
        load_recipe(
            tmp_path / "r.yaml",
            lambda runtime: targets.load(runtime).Options,
            targets.names(),
            (),
            hardware=hardware.names(),
            metrics=tuple(metrics()),
        )
    assert next(iter(field)) in str(error.value)


def test_one_checkpoint_for_every_server() -> None:
    """Equal schemes give equal steps, whatever the target."""
    steps = [planned(runtime, precision="int4") for runtime in ("transformers", "vllm", "turbomind")]
    quantized = {json.dumps(vars(options_of(each, "quantized").scheme)) for each in steps}
    assert quantized == {
        json.dumps({"layout": "w4a16", "dtype": "bf16", "method": "awq", "group_size": 128, "symmetric": True})
    }
    assert [step.name for step in steps[1]] == [
        "model", "reference", "calibration", "observed", "quantized", "parity.checkpoint", "engine", "golden",
    ]  # fmt: skip
    assert "parity" in [step.name for step in steps[0]]


def test_the_commands_that_serve() -> None:
    vllm = options_of(
        planned("vllm", precision="int8", serve={"tp": 2, "pp": 2, "nodes": 2, "max_model_len": 2048}), "engine"
    )
    assert " ".join(vllm.serve) == (
        "vllm serve {artifact} --dtype bfloat16 --max-model-len 2048 --kv-cache-dtype auto --tensor-parallel-size 2 "
        "--pipeline-parallel-size 2 --data-parallel-size 1 --gpu-memory-utilization 0.9 --enable-prefix-caching "
        "--distributed-executor-backend mp --nnodes 2 --host 127.0.0.1 --port 8000"
    )
    lmdeploy = options_of(
        planned("turbomind", precision="int4", serve={"tp": 2, "kv_cache": "int8", "prefix_caching": True}), "engine"
    )
    assert " ".join(lmdeploy.serve) == (
        "lmdeploy serve api_server {artifact} --backend turbomind --dtype bfloat16 --model-format compressed-tensors "
        "--tp 2 --dp 1 --session-len 4096 --cache-max-entry-count 0.8 --cache-block-seq-len 64 --enable-prefix-caching "
        "--quant-policy 8 --max-prefill-token-num 8192 --communicator nccl --server-name 127.0.0.1 --server-port 23333"
    )


def test_auto_is_decided_in_the_plan() -> None:
    told = options_of(planned("vllm", precision="int4", config={"torch_dtype": "float32"}), "quantized")
    assert (told.scheme.dtype, told.scheme.method) == ("bf16", "awq")
    moe = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 2}
    assert options_of(planned("vllm", precision="int4", config=moe), "quantized").scheme.method == "rtn"


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "gguf"])
def test_nothing_holds_the_whole_of_a_large_model(runtime: str) -> None:
    """The reference is streamed; no fp32 engine is made to compare with, and no blob compiled, unless asked for."""
    precision = "Q4_K_M" if runtime == "gguf" else "int4"
    small = planned(runtime, precision=precision, weights=8 << 30)
    assert "unquantized" in {step.name for step in small}
    assert not options_of(small, "reference").streamed
    large = planned(runtime, precision=precision, weights=9 << 30)
    assert options_of(large, "reference").streamed
    assert {"unquantized", "parity.unquantized"}.isdisjoint(step.name for step in large)
    assert not any(step.stage.name == "openvino.compile" for step in large)
    asked = planned(runtime, precision=precision, weights=9 << 30, unquantized_gates={"kld_mean": 1e-5})
    assert {"unquantized", "parity.unquantized"} <= {step.name for step in asked}


def test_another_exporter_does_not_ask_what_the_fused_one_makes_of_the_configuration() -> None:
    """A field that it misses is its own error; torch's exporter reads the configuration itself."""
    without: dict[str, Any] = {"config": {"num_attention_heads": None}}
    with pytest.raises(EnginewrightError, match="num_attention_heads"):
        planned("onnxruntime", **without)
    exported = next(step for step in planned("onnxruntime", exporter="torch", **without) if step.name == "export")
    assert exported.stage.name == "onnx.torch"


def test_a_large_model_of_an_unknown_kind_is_loaded_whole() -> None:
    steps = planned("onnxruntime", config={"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, weights=9 << 30)
    assert not options_of(steps, "reference").streamed
