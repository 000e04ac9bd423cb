"""Reading safetensors without torch: values, slices, shards, and every way a folder can be broken."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import RecipeError, StageError
from pipeline.stages.checkpoint import Checkpoint, read_header


def write(folder: Path, **tensors: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_are_those_of_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor = Checkpoint(write(tmp_path, a=torch.zeros(3), w=values))["w"]
    assert tensor.shape == (7, 5, 3) and tensor.elements == 105
    assert np.array_equal(tensor.numpy(), values.float().numpy())
    assert np.array_equal(tensor.rows(2, 5), values[2:5].float().numpy())
    assert tensor.numpy().dtype == np.float32
    native = tensor.numpy("native")
    assert native.nbytes == values.nbytes and native.tobytes() == values.view(torch.uint8).numpy().tobytes()


def test_slices_cover_the_tensor_in_small_pieces(tmp_path: Path) -> None:
    values = torch.arange(1000 * 8, dtype=torch.float32).reshape(1000, 8)
    pieces = list(Checkpoint(write(tmp_path, w=values))["w"].slices(1024))
    assert max(piece.nbytes for _, piece in pieces) <= 1024
    assert [start for start, _ in pieces] == list(range(0, 1000, 32))
    assert np.array_equal(np.concatenate([piece for _, piece in pieces]), values.numpy())


def test_scalars_integers_and_empty_tensors(tmp_path: Path) -> None:
    folder = write(tmp_path, s=torch.tensor(3.5), i=torch.tensor([1, 2]), e=torch.zeros(0, 4))
    checkpoint = Checkpoint(folder)
    assert checkpoint["s"].numpy() == 3.5 and checkpoint["s"].numpy().shape == ()
    assert checkpoint["i"].numpy("native").tolist() == [1, 2]
    assert checkpoint["e"].numpy().shape == (0, 4)
    with pytest.raises(StageError, match="'i' has type I64"):
        checkpoint["i"].numpy()


def sharded(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    checkpoint = Checkpoint(sharded(tmp_path))
    assert list(checkpoint) == ["a", "b"] and len(checkpoint) == 2
    assert checkpoint["b"].path.name == "two.safetensors"


def broken_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "two.safetensors").unlink()


def broken_index(folder: Path) -> None:
    sharded(folder)
    index = {"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def broken_path(folder: Path) -> None:
    sharded(folder)
    index = {"weight_map": {"a": "../one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def broken_end(folder: Path) -> None:
    write(folder, w=torch.ones(100))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def broken_header(folder: Path) -> None:
    write(folder, w=torch.ones(100))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def broken_json(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"nope")


def broken_start(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"abc")


def broken_shape(folder: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (broken_shard, r"names two\.safetensors \(for tensor 'b'\), which is not there"),
        (broken_index, r"two\.safetensors lacks tensor 'c'"),
        (broken_path, r"'\.\./one\.safetensors', which is not a file of the model folder"),
        (broken_end, r"model\.safetensors is truncated: tensor 'w' ends at byte"),
        (broken_header, r"model\.safetensors is truncated: its header says"),
        (broken_json, r"no readable safetensors header"),
        (broken_start, r"3 bytes are no safetensors file"),
        (broken_shape, r"'w' of shape \[3\] and type F32 cannot have 8 bytes"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, word: str) -> None:
    damage(tmp_path)
    with pytest.raises(StageError, match=word):
        Checkpoint(tmp_path)


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(RecipeError, match=r"only as pytorch_model\.bin, a pickle") as caught:
        Checkpoint(tmp_path)
    assert "save_pretrained" in caught.value.hint and tmp_path.name in caught.value.hint


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"neither model\.safetensors nor"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_named(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    values = torch.ones(50, 4, dtype=dtype)
    values[33, 2] = bad
    tensor = Checkpoint(write(tmp_path, **{"layer.weight": values}))["layer.weight"]
    assert tensor.rows(0, 33).min() == 1
    with pytest.raises(StageError, match=r"'layer\.weight' holds (nan|-?inf) at \[33, 2\]"):
        tensor.rows(20, 50)
    with pytest.raises(StageError, match=r"at \[33, 2\]"):
        tensor.rows(20, 50, "native")


def test_take_says_what_is_missing_and_why_a_shape_is_wrong(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path, **{"model.layers.0.mlp.up_proj.weight": torch.zeros(4, 2)}))
    assert checkpoint.take("model.layers.0.mlp.up_proj.weight", (4, 2)).shape == (4, 2)
    with pytest.raises(StageError, match=r"no tensor 'layers\.1\.up_proj\.weight'") as caught:
        checkpoint.take("layers.1.up_proj.weight")
    assert "model.layers.0.mlp.up_proj.weight" in caught.value.hint
    with pytest.raises(StageError, match=r"shape \[4, 2\], but config.json asks for \[5, 2\] \(vocab_size is 5\)"):
        checkpoint.take("model.layers.0.mlp.up_proj.weight", (5, 2), "vocab_size is 5")


@pytest.mark.parametrize(
    ("text", "word"), [(None, "has no config.json"), ("{", "is not JSON"), ("[]", "not a JSON object")]
)
def test_config(tmp_path: Path, text: str | None, word: str) -> None:
    checkpoint = Checkpoint(write(tmp_path, w=torch.zeros(1)))
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(StageError, match=word):
        _ = checkpoint.config


def test_headers_are_in_the_order_of_the_file(tmp_path: Path) -> None:
    folder = write(tmp_path, z=torch.zeros(2), a=torch.ones(3, dtype=torch.bfloat16))
    tensors = list(read_header(folder / "model.safetensors").values())
    assert [tensor.offset for tensor in tensors] == sorted(tensor.offset for tensor in tensors)
