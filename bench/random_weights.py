"""Write a checkpoint of random weights in the shape of a real model, to measure where no model hub can be reached.

    python bench/random_weights.py --preset qwen2.5-0.5b qwen-shape
    python bench/random_weights.py --config config.json --dtype fp16 my-shape

Sizes, speed and memory depend on a model's shape and not on what its weights mean. The names and shapes come from
transformers on the meta device; the values are drawn, converted and written a slice at a time, so that a 7B needs as
little memory as a small one. A tensor's values depend on the seed and its name, not on the shards.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

TOKENIZER = Path(__file__).parent.parent / "recipes" / "models" / "pydoc-llama"
SLICE = 1 << 24  # values drawn at a time: 64 MiB in fp32
SPREAD = 0.02  # the standard deviation that these families start from: activations stay finite
# dtype of torch, its name in a safetensors header, bytes a value
DTYPES = {"bf16": (torch.bfloat16, "BF16", 2), "fp16": (torch.float16, "F16", 2), "fp32": (torch.float32, "F32", 4)}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    "tinyllama-1.1b": {
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "llama-2-7b": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
}


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor that the checkpoint of such a model holds; a tied one is named once."""
    kind, fields = config["model_type"], {name: value for name, value in config.items() if name != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**fields, "torch_dtype": "float32"}))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if any("experts" in name and len(shape) == 3 for name, shape in shapes.items()):
        raise SystemExit(f"{kind}: transformers fuses the experts of this model, so its checkpoint has other names")
    return shapes


def shards_of(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """The names in order, in groups of at most `limit` bytes; a tensor above it has a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def values(name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Iterator[bytes]:
    """The bytes of one tensor, slice by slice: ones for the scale of a norm, a small normal spread for the rest."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator, left = np.random.default_rng(int.from_bytes(digest[:16], "little")), int(np.prod(shape))
    norm = len(shape) == 1 and name.endswith(".weight")
    while left:
        count = min(left, SLICE)
        if norm:
            drawn = np.ones(count, np.float32)
        else:
            drawn = generator.standard_normal(count, np.float32)
            drawn *= np.float32(SPREAD)
        # numpy has no bfloat16: torch rounds, and its result is read as plain bytes
        yield torch.from_numpy(drawn).to(dtype).view(torch.uint8).numpy().tobytes()
        left -= count


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], sizes: dict[str, int], dtype: str, seed: int) -> None:
    """One safetensors file: the length of the header, the header, then the tensors in its order without gaps."""
    kind, code, _ = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end + sizes[name]]}
        end += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    scratch = path.with_suffix(".part")
    with scratch.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for part in values(name, shape, seed, kind):
                file.write(part)
    scratch.rename(path)


def write_weights(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: str, limit: int, seed: int) -> int:
    """All shards, with an index where there is more than one; their size in bytes."""
    sizes = {name: int(np.prod(shape)) * DTYPES[dtype][2] for name, shape in shapes.items()}
    shards, places, total = shards_of(sizes, limit), dict[str, str](), sum(sizes.values())
    for number, names in enumerate(shards, 1):
        many = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = many if len(shards) > 1 else "model.safetensors"
        write_shard(folder / file, {name: shapes[name] for name in names}, sizes, dtype, seed)
        places.update(dict.fromkeys(names, file))
        print(f"{file}  {sum(sizes[name] for name in names) / 2**20:.0f} MiB", flush=True)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return total


def copy_tokenizer(source: Path, folder: Path, config: dict[str, Any]) -> None:
    """Copy a tokenizer whose ids this model has, and let the config name the same special tokens."""
    core = json.loads((source / "tokenizer.json").read_text("utf-8"))
    highest = max([*core["model"]["vocab"].values(), *(token["id"] for token in core["added_tokens"])])
    if highest >= config["vocab_size"]:
        raise SystemExit(f"{source}: its highest id is {highest}, the model's vocabulary has {config['vocab_size']}")
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    settings = json.loads((source / "tokenizer_config.json").read_text("utf-8"))
    settings["model_max_length"] = config.get("max_position_embeddings", settings.get("model_max_length"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    theirs = json.loads((source / "config.json").read_text("utf-8"))
    ids = {f"{name}_token_id": theirs.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config.update(ids)
    (folder / "generation_config.json").write_text(json.dumps({**ids, "max_new_tokens": 128}, indent=2) + "\n", "utf-8")


def byte_size(text: str) -> int:
    """`512MiB`, `1GiB` or plain bytes, in bytes."""
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    scale = units.get(text[-3:], 1)
    number = int(text[:-3] if scale > 1 else text) * scale
    if number < 1:
        raise ValueError(text)
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to fill: new or empty")
    shape = parser.add_mutually_exclusive_group(required=True)
    shape.add_argument("--preset", choices=sorted(PRESETS), help="a shape that is written out in this script")
    shape.add_argument("--config", type=Path, help="the config.json of any other decoder")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="of the weights")
    parser.add_argument("--shard-size", type=byte_size, default="1GiB", help="the most bytes in one file")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="the checkpoint to copy it from")
    parser.add_argument("--seed", type=int, default=0, help="of the values")
    arguments = parser.parse_args()
    if arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"{arguments.out} is not empty")

    config = json.loads(arguments.config.read_text("utf-8")) if arguments.config else dict(PRESETS[arguments.preset])
    config.pop("dtype", None)
    config["torch_dtype"] = str(DTYPES[arguments.dtype][0]).removeprefix("torch.")
    shapes = shapes_of(config)
    arguments.out.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(arguments.tokenizer, arguments.out, config)
    (arguments.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    total = write_weights(arguments.out, shapes, arguments.dtype, arguments.shard_size, arguments.seed)
    parameters = sum(int(np.prod(shape)) for shape in shapes.values())
    print(f"{len(shapes)} tensors, {parameters / 1e6:.1f}M parameters, {total / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
