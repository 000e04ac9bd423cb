"""Stage reference on tiny random models, held against transformers itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pipeline.errors import RecipeError, StageError
from pipeline.parity.pooling import read_pooling
from pipeline.parity.stored import Stored
from pipeline.stages import reference_run as reference
from pipeline.stages import reference_stream
from pipeline.stages.reference import ReferenceOptions, run
from pipeline.stages.samples import load_encoder
from pipeline.step import silent
from tests import models


@pytest.fixture(autouse=True)
def judge_as_the_stage() -> Iterator[None]:
    """torch takes other kernels with gradients: 6e-4 in the logits of a T5 with large random weights."""
    before = torch.get_num_threads()
    torch.set_num_threads(ReferenceOptions().threads)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


SMALL = {"samples": 4, "length": 16, "prompt_count": 3, "new_tokens": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Model folders by the name of their builder, made once."""
    made: dict[str, Path] = {}

    def make(name: str, *args: Any, **settings: Any) -> Path:
        key = f"{name}{args}{settings}"
        if key not in made:
            made[key] = getattr(models, name)(tmp_path_factory.mktemp(name), *args, **settings)
        return made[key]

    return make


def build(out: Path, model: Path, data: Path | None = None, prompts: Path | None = None, **options: Any) -> Stored:
    inputs = {"model": model} | ({"data": data} if data else {}) | ({"prompts": prompts} if prompts else {})
    out.mkdir(exist_ok=True)
    run(inputs, ReferenceOptions(**SMALL | options), out, silent)
    return Stored.open(out)


def text(folder: Path, *lines: str, name: str = "data.txt") -> Path:
    folder.mkdir()
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def near(found: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(found, expected[0].detach().numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decoder(folder: Callable[..., Path], tmp_path: Path, name: str) -> None:
    lines = ["the quick brown fox jumps over the lazy dog", "", "a model is exported once", ""] * 9
    prompts = text(
        tmp_path / "p", '{"prompt": "the fox"}', '{"prompt": "a dog"}', '{"prompt": "once"}', name="data.jsonl"
    )
    stored = build(tmp_path / "out", folder(name), text(tmp_path / "d", *lines), prompts)
    assert (stored.kind, stored.task, stored.samples) == ("decoder", "text-generation", 4)
    assert stored.info["source"] == "data"
    assert stored.info["eos_token_ids"] == [models.EOS]
    assert stored.arrays["outputs.logits"].shape == (4, 16, models.VOCAB)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder(name)).float().eval()
    for index in range(4):
        near(stored.output("logits", index)[1], model(**tensors(stored.inputs(index))).logits)
    greedy = stored.greedy()
    assert greedy is not None and greedy.prompts is not None
    encoder = load_encoder(folder(name), models.VOCAB)
    assert greedy.prompts == [encoder.encode(prompt).ids for prompt in ("the fox", "a dog", "once")]
    for prompt, tokens in zip(greedy.prompts, greedy.tokens, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
        assert tokens == expected.tolist()


def test_greedy_stops_after_the_end_token(folder: Callable[..., Path], tmp_path: Path) -> None:
    model = folder("llama")
    first = build(tmp_path / "a", model, new_tokens=4).greedy()
    assert first is not None
    config = json.loads((model / "generation_config.json").read_text())
    other = tmp_path / "model"
    other.mkdir()
    for path in model.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    ends = [first.tokens[0][1], first.tokens[1][0]]
    (other / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    stored = build(tmp_path / "b", other, new_tokens=4)
    assert stored.info["eos_token_ids"] == ends
    # The random inputs avoid the new end tokens, so the prompts of before are given again.
    lines = [json.dumps({"prompt": load_encoder(model, models.VOCAB).decode(p)}) for p in first.prompts or []]
    assert lines
    found = reference.load(other, ReferenceOptions())
    for prompt, whole in zip((first.prompts or [])[:2], first.tokens[:2], strict=True):
        tokens = reference.greedy_decode(found, {"input_ids": np.array(prompt)}, 4)
        stop = next(i for i, token in enumerate(whole) if token in ends)
        assert tokens == whole[: stop + 1]


def test_prompts_are_cut_from_the_data(folder: Callable[..., Path], tmp_path: Path) -> None:
    data = text(tmp_path / "d", *["the quick brown fox jumps over the lazy dog"] * 9)
    stored = build(tmp_path / "out", folder("llama"), data)
    greedy = stored.greedy()
    assert greedy is not None
    assert greedy.prompts == [stored.inputs(index)["input_ids"][0, :8].tolist() for index in range(3)]


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize(
    "task", ["feature-extraction", "fill-mask", "text-classification", "token-classification", "question-answering"]
)
def test_encoders(folder: Callable[..., Path], tmp_path: Path, name: str, task: str) -> None:
    path = folder(name, task, **({"num_labels": 2} if task == "question-answering" else {}))
    stored = build(
        tmp_path / "out", path, text(tmp_path / "d", "the fox", "a lazy dog jumps", "once", "a model of a fox")
    )
    assert (stored.kind, stored.task) == ("encoder", task)
    assert not (tmp_path / "out/greedy.json").exists()
    assert ("token_type_ids" in stored.info["inputs"]) is (name == "bert")
    loaded = reference.load(path, ReferenceOptions(task=task)).model  # type: ignore[arg-type]
    lengths = set()
    for index in range(4):
        inputs = stored.inputs(index)
        lengths.add(inputs["input_ids"].shape[1])
        expected = loaded(**tensors(inputs))
        for output in stored.outputs:
            near(stored.output(output, index)[1], getattr(expected, output))
    assert len(lengths) > 2
    outputs = {"feature-extraction": ("last_hidden_state",), "question-answering": ("start_logits", "end_logits")}
    assert stored.outputs == outputs.get(task, ("logits",))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_sentence_embeddings(folder: Callable[..., Path], tmp_path: Path, pooling: str, normalize: bool) -> None:
    judge = pytest.importorskip("sentence_transformers")
    path = folder("sentence_transformer", pooling=pooling, normalize=normalize)
    lines = ["the fox", "a lazy dog jumps over the fox", "once", "many times served"]
    stored = build(tmp_path / "out", path, text(tmp_path / "d", *lines))
    assert stored.outputs == ("last_hidden_state", "sentence_embedding")
    assert "sentence_embedding" not in stored.info["lengths"]
    expected = judge.SentenceTransformer(str(path), device="cpu").encode(lines, batch_size=1)
    for index, vector in enumerate(expected):
        np.testing.assert_allclose(stored.output("sentence_embedding", index)[1], vector, atol=1e-5)


def test_pooling_that_is_not_known(folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"1_Pooling/config.json: pooling 'max' is not supported"):
        build(tmp_path / "out", folder("sentence_transformer", pooling="max"))
    path = tmp_path / "st"
    path.mkdir()
    for kinds, message in (
        (["Transformer", "Pooling", "Dense"], "Dense are not supported"),
        (["CLIPModel"], "CLIPModel"),
    ):
        modules = [{"idx": i, "path": f"{i}", "type": f"sentence_transformers.models.{k}"} for i, k in enumerate(kinds)]
        (path / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(RecipeError, match=message):
            read_pooling(path)
    modules = [{"path": "", "type": "a.Transformer"}, {"path": "../../etc", "type": "a.Pooling"}]
    (path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(RecipeError, match="leaves the folder"):
        read_pooling(path)
    modules[1]["path"] = "new"
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "new").mkdir()
    (path / "new/config.json").write_text(json.dumps({"pooling_mode": "cls", "embedding_dimension": 64}))
    found = read_pooling(path)
    assert found is not None
    assert (found.mode, found.normalize) == ("cls", False)
    (path / "new/config.json").write_text("{")
    with pytest.raises(RecipeError, match=r"new/config.json: cannot be read"):
        read_pooling(path)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("source", ["data", "random"])
def test_encoder_decoders(folder: Callable[..., Path], tmp_path: Path, name: str, source: str) -> None:
    data = text(tmp_path / "d", "the fox", "a lazy dog jumps", "once", "many times") if source == "data" else None
    stored = build(tmp_path / "out", folder(name), data)
    assert (stored.kind, stored.task) == ("seq2seq", "text2text-generation")
    assert stored.info["inputs"] == ["input_ids", "attention_mask", "decoder_input_ids"]
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder(name)).float().eval()
    greedy = stored.greedy()
    assert greedy is not None and greedy.prompts is not None
    for index in range(4):
        inputs = stored.inputs(index)
        near(stored.output("logits", index)[1], model(**tensors(inputs)).logits)
        assert inputs["decoder_input_ids"][0, 0] == stored.info["decoder_start_token_id"]
    for prompt, tokens in zip(greedy.prompts, greedy.tokens, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, num_beams=1)[0, 1:]
        assert tokens == expected.tolist()
    if source == "data":
        assert greedy.prompts[0] == stored.inputs(0)["input_ids"][0].tolist()
        fed = stored.inputs(0)["decoder_input_ids"][0, 1:].tolist()
        assert fed == [token for token in greedy.tokens[0] if token != models.EOS]


def test_speech(folder: Callable[..., Path], tmp_path: Path) -> None:
    stored = build(tmp_path / "out", folder("whisper"))
    assert (stored.kind, stored.task) == ("seq2seq", "automatic-speech-recognition")
    assert stored.info["inputs"] == ["input_features", "decoder_input_ids"]
    assert stored.arrays["inputs.input_features"].shape == (4, 16, 100)
    model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder("whisper")).float().eval()
    near(stored.output("logits", 3)[1], model(**tensors(stored.inputs(3))).logits)
    greedy = stored.greedy()
    assert greedy is not None
    assert greedy.prompts is None
    ids = torch.tensor([[models.BOS]])
    for token in greedy.tokens[2]:
        features = torch.from_numpy(stored.inputs(2)["input_features"])
        assert int(model(input_features=features, decoder_input_ids=ids).logits[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    with pytest.raises(RecipeError, match=r"data are text, and the model takes input_features"):
        build(tmp_path / "two", folder("whisper"), text(tmp_path / "d", "a"))
    with pytest.raises(RecipeError, match="3 samples are to be continued, and there are 2"):
        build(tmp_path / "three", folder("whisper"), samples=2)
    with pytest.raises(RecipeError, match="65 tokens is more than the model's 64 positions"):
        build(tmp_path / "four", folder("whisper"), length=65)


def test_images(folder: Callable[..., Path], tmp_path: Path) -> None:
    stored = build(tmp_path / "out", folder("vit"))
    assert (stored.kind, stored.task, stored.outputs) == ("encoder", "image-classification", ("logits",))
    assert stored.arrays["inputs.pixel_values"].shape == (4, 3, 32, 32)
    assert stored.info["lengths"] == {}
    model = transformers.AutoModelForImageClassification.from_pretrained(folder("vit")).float().eval()
    near(stored.output("logits", 1)[1], model(**tensors(stored.inputs(1))).logits)


def test_the_seed_decides_the_bytes(folder: Callable[..., Path], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    for name, options in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("d", {"samples": 6})):
        build(tmp_path / name, folder("llama"), **options)
    assert torch.get_num_threads() == before
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {"reference.json", "greedy.json", "inputs.input_ids.npy", "inputs.attention_mask.npy"} | {
        "outputs.logits.npy"
    }
    a, b, c, d = ({name: (tmp_path / run / name).read_bytes() for name in files} for run in "abcd")
    assert a == b
    assert a["inputs.input_ids.npy"] != c["inputs.input_ids.npy"]
    assert a["greedy.json"] != c["greedy.json"]
    # More samples leave the first ones and the prompts as they were.
    assert a["greedy.json"] == d["greedy.json"]
    assert np.array_equal(np.load(tmp_path / "a/outputs.logits.npy"), np.load(tmp_path / "d/outputs.logits.npy")[:4])


def test_random_ids_have_no_special_tokens(folder: Callable[..., Path], tmp_path: Path) -> None:
    stored = build(tmp_path / "out", folder("bert"), samples=20)
    ids = np.concatenate([stored.inputs(index)["input_ids"][0] for index in range(20)])
    assert models.PAD not in ids
    assert models.EOS not in ids
    assert {stored.inputs(index)["input_ids"].shape[1] for index in range(20)} <= set(range(8, 17))
    assert set(np.unique(stored.inputs(0)["token_type_ids"])) == {0, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 257}, "257 tokens is more than the model's 256 positions"),
        ({"new_tokens": 256}, "new ones exceed the model's 256 positions"),
    ],
)
def test_what_the_model_cannot_take(
    folder: Callable[..., Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        build(tmp_path / "out", folder("llama"), **options)


def test_more_prompts_than_samples(folder: Callable[..., Path], tmp_path: Path) -> None:
    data = text(tmp_path / "d", *["the quick brown fox jumps over the lazy dog"] * 9)
    with pytest.raises(RecipeError, match="3 prompts are asked for, and there are 2 samples"):
        build(tmp_path / "out", folder("llama"), data, samples=2)


def test_weights_that_overflow(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    for file in folder("llama").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(weights | {name: weights[name] * 3e38}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageError, match=r"NaN or infin"):
        build(tmp_path / "out", path)
    save_file(weights | {name: weights[name] * 1e38}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageError, match=r"NaN or infinity in 'logits' of sample 0"):
        build(tmp_path / "out", path)


def test_nan_in_the_weights_is_named(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    for file in folder("llama").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights = load_file(path / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageError, match=r"model.layers.0.mlp.up_proj.weight"):
        build(tmp_path / "out", path)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_layer_by_layer_gives_the_same_bytes(
    name: str, dtype: str, folder: Callable[..., Path], tmp_path: Path
) -> None:
    """More samples than go side by side, prompts that end at different times, and weights that are gone in between."""
    model = folder(name, dtype=dtype, shard="50KB")
    told = {"samples": 10, "length": 16, "prompt_count": 9, "new_tokens": 12}
    build(tmp_path / "loaded", model, **told)
    build(tmp_path / "streamed", model, streamed=True, **told)
    for file in sorted(path.name for path in (tmp_path / "loaded").iterdir()):
        assert (tmp_path / "streamed" / file).read_bytes() == (tmp_path / "loaded" / file).read_bytes(), file


def test_an_error_of_one_pass_ends_them_all(folder: Callable[..., Path]) -> None:
    model, convoy = reference_stream.load(folder("llama"))

    def work(number: int) -> int:
        ids = torch.tensor([[number]])
        if number == 5:
            raise ZeroDivisionError("a bug")
        return int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())

    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(convoy.run([partial(work, number) for number in range(8)]))
    assert len(list(convoy.run([partial(work, number) for number in range(4)]))) == 4


def test_one_layer_is_held_at_a_time(folder: Callable[..., Path]) -> None:
    model, convoy = reference_stream.load(folder("llama"))
    held: list[int] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda *_: held.append(sum(p.device.type == "cpu" for p in model.model.layers.parameters()))
        )
    list(convoy.run([partial(model, input_ids=torch.tensor([[1, 2]]), use_cache=False) for _ in range(3)]))
    assert set(held) == {sum(1 for _ in model.model.layers[0].parameters())}
    assert all(p.device.type == "meta" for p in model.model.layers.parameters())


def test_a_tensor_that_is_missing_is_named(folder: Callable[..., Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder("llama"), model)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageError, match=r"no tensor 'model.layers.1.mlp.up_proj.weight'"):
        build(tmp_path / "out", model, streamed=True)
