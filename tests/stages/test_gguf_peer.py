"""Our GGUF tensors beside those of llama.cpp's own converter and quantizer, bit by bit.

Opt-in: ENGINEWRIGHT_LLAMA_CPP names llama.cpp's source tree with libllama built (docs/decisions/gguf.md says how).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.stages.gguf import imatrix as gguf_imatrix
from pipeline.stages.gguf.file import read_tensors
from pipeline.stages.gguf.imatrix import ImportanceOptions
from pipeline.step import silent
from tests.conftest import ROOT
from tests.stages.ggufs import build, family

TREE = os.environ.get("ENGINEWRIGHT_LLAMA_CPP", "")
pytestmark = [
    pytest.mark.optin,
    pytest.mark.skipif(not TREE, reason="ENGINEWRIGHT_LLAMA_CPP names llama.cpp's source tree, built"),
]
LLAMA = ROOT / "recipes" / "models" / "pydoc-llama"
CONVERTED = [
    *("pydoc-llama", "llama, llama3 rope", "llama, biases, tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2"),
    *("gemma3", "phi3", "phi3, long rope", "mixtral", "qwen3_moe"),
]
LABELS = [
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"),
    *("IQ4_XS", "IQ4_NL", "MXFP4", "F16", "BF16"),
]


def peer(*argv: object) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "llama_cpp.py"), *map(str, argv)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def source(path: Path, name: str, dtype: str = "bfloat16") -> Path:
    return LLAMA if name == "pydoc-llama" else family(path, name, dtype)


def unequal(ours: Path, theirs: Path) -> list[str]:
    """Names of tensors that differ in type, shape or bytes, or that one side lacks."""
    mine, other = read_tensors(ours), read_tensors(theirs)
    wrong = sorted(set(mine) ^ set(other))
    for name in set(mine) & set(other):
        a, b = mine[name], other[name]
        if (a.type, a.shape) != (b.type, b.shape) or a.read(ours) != b.read(theirs):
            wrong.append(f"{name}: {a.type} {a.shape}, {b.type} {b.shape}")
    return wrong


def file_of(folder: Path) -> Path:
    return next(folder.glob("*.gguf"))


@pytest.mark.parametrize("name", CONVERTED)
def test_f16_tensors_are_the_official_converters(name: str, tmp_path: Path) -> None:
    model = source(tmp_path / "model", name)
    peer("convert", TREE, model, tmp_path / "theirs.gguf", "f16")
    ours = file_of(build(model, tmp_path / "ours", "F16"))
    len(read_tensors(ours))
    wrong = unequal(ours, tmp_path / "theirs.gguf")
    assert wrong == []


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("name", ["pydoc-llama", "qwen2", "gemma2", "phi3", "mixtral", "qwen3_moe"])
def test_quantized_tensors_are_llama_cpps(name: str, label: str, tmp_path: Path) -> None:
    model = source(tmp_path / "model", name, "float32")
    plain = file_of(build(model, tmp_path / "plain", "F32"))
    ours = file_of(build(model, tmp_path / "ours", label, allow_fallback=True))
    peer("quantize", TREE, plain, tmp_path / "theirs.gguf", label)
    len(read_tensors(ours))
    wrong = unequal(ours, tmp_path / "theirs.gguf")
    assert wrong == []


@pytest.mark.parametrize("layers", [8, 16, 40])
@pytest.mark.parametrize("label", ["Q4_K_M", "Q4_K_S", "Q5_K_M", "Q3_K_M", "IQ4_XS", "Q2_K"])
def test_layers_that_get_more_bits_are_llama_cpps(label: str, layers: int, tmp_path: Path) -> None:
    model = family(tmp_path / "model", "llama, llama3 rope", num_hidden_layers=layers, num_key_value_heads=8)
    plain = file_of(build(model, tmp_path / "plain", "F32"))
    ours = file_of(build(model, tmp_path / "ours", label))
    peer("quantize", TREE, plain, tmp_path / "theirs.gguf", label)
    assert unequal(ours, tmp_path / "theirs.gguf") == []


@pytest.mark.parametrize("hidden", [192, 96])
@pytest.mark.parametrize("label", ["Q4_K_M", "Q3_K_M", "Q2_K", "Q6_K", "IQ4_XS", "Q5_K_S", "Q8_0"])
def test_rows_that_no_block_divides_are_llama_cpps(label: str, hidden: int, tmp_path: Path) -> None:
    model = family(tmp_path / "model", "qwen2", hidden_size=hidden, intermediate_size=hidden * 2, num_attention_heads=6)
    plain = file_of(build(model, tmp_path / "plain", "F32"))
    ours = file_of(build(model, tmp_path / "ours", label, allow_fallback=True))
    peer("quantize", TREE, plain, tmp_path / "theirs.gguf", label)
    assert unequal(ours, tmp_path / "theirs.gguf") == []


@pytest.mark.parametrize("label", ["Q4_K_M", "Q2_K", "IQ4_XS", "Q4_0"])
def test_an_importance_matrix_is_used_as_llama_cpp_does(label: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.txt").write_bytes((ROOT / "recipes" / "data" / "pydoc-calibration.txt").read_bytes())
    measured = tmp_path / "importance"
    measured.mkdir()
    gguf_imatrix.run(
        {"model": LLAMA, "calibration": tmp_path / "data"}, ImportanceOptions(samples=2, length=64), measured, silent
    )
    plain = file_of(build(LLAMA, tmp_path / "plain", "F32"))
    ours = file_of(build(LLAMA, tmp_path / "ours", label, {"importance": measured}))
    peer("quantize", TREE, plain, tmp_path / "theirs.gguf", label, measured / gguf_imatrix.FILE)
    assert unequal(ours, tmp_path / "theirs.gguf") == []


SECOND_CHOICE = """\
import sys
import numpy as np
from pathlib import Path
from pipeline.stages.gguf import native as gguf_native
gguf_native._PLACES = (("llama_cpp", "lib/libllama.so"),)
from pipeline.targets.gguf_llama import Llama
rows = np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
print(gguf_native.quantize(gguf_native.quantizer(), 12, rows, None).shape)
llama = Llama(Path(sys.argv[1]), kv="F32", threads=2, gpu_layers=0)
print(llama.run([1, 600, 700]).argmax(-1).tolist())
"""


def test_llama_cpp_python_is_the_second_choice(tmp_path: Path) -> None:
    """Its wheel holds llama.cpp's libraries in llama_cpp/lib; those that were built here stand for them."""
    from pipeline.targets.gguf_engine import open_engine

    build_folder = (
        next(p for p in (Path(TREE), *Path(TREE).parents) if (p / "build" / "bin").is_dir()) / "build" / "bin"
    )
    (tmp_path / "site" / "llama_cpp").mkdir(parents=True)
    (tmp_path / "site" / "llama_cpp" / "__init__.py").write_text("raise RuntimeError('it must not be imported')")
    (tmp_path / "site" / "llama_cpp" / "lib").symlink_to(build_folder)
    folder = build(LLAMA, tmp_path / "out", "F32")
    path = os.pathsep.join([str(ROOT), str(tmp_path / "site")])
    done = subprocess.run(
        [sys.executable, "-c", SECOND_CHOICE, str(file_of(folder))],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = open_engine(folder).child.logits("run", ids=[1, 600, 700]).argmax(-1).tolist()
    assert done.stdout.splitlines() == ["(2, 144)", str(expected)]
