"""The engine over ONNX Runtime, judged by transformers, by ONNX Runtime GenAI and by numpy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from pipeline.decoding import decode  # noqa: E402
from pipeline.engine import Array, Engine, Sampling, completions  # noqa: E402
from pipeline.errors import RecipeError, StageError, UnavailableError  # noqa: E402
from pipeline.stages.onnx import fused as onnx_fused  # noqa: E402
from pipeline.stages.onnx import torch as onnx_torch  # noqa: E402
from pipeline.stages.onnx import weights as onnx_weights  # noqa: E402
from pipeline.step import silent  # noqa: E402
from pipeline.targets import ort_cache  # noqa: E402
from pipeline.targets.ort_engine import open_engine  # noqa: E402
from tests import models  # noqa: E402
from tests.targets import toys  # noqa: E402

PROMPTS = [[5, 9, 11], [7, 8, 60, 61, 62, 63, 64], [44], [33, 20, 20, 33, 20]]
TOY_PROMPTS = [[5, 9, 11], [7, 8, 3, 13, 14], [4]]
MODES: list[dict[str, Any]] = [{}, {"beams": 4}, {"repetition_penalty": 1.3}, {"beams": 3, "length_penalty": 2.0}]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models: torch's threads would mostly wait for each other, for minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the model in torch, its engine's folder)."""
    root = tmp_path_factory.mktemp("llama")
    folder = models.llama(root / "model", seed=1)
    (root / "export").mkdir()
    (root / "engine").mkdir()
    onnx_fused.run({"model": folder}, onnx_fused.FusedOptions(), root / "export", silent)
    inputs = {"model": folder, "export": root / "export"}
    onnx_weights.run(inputs, onnx_weights.WeightOptions(precision="fp32", threads=1), root / "engine", silent)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), root / "engine"


def theirs(model: Any, prompt: Sequence[int], new: int, **options: Any) -> list[int]:
    ids = torch.tensor([list(prompt)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options)
    tokens = [int(token) for token in out[0, len(prompt) :]]
    return tokens[: tokens.index(models.EOS) + 1] if models.EOS in tokens else tokens


def padded(prompts: Sequence[Sequence[int]], left: bool) -> tuple[Array, Array]:
    longest = max(map(len, prompts))
    ids, mask = np.zeros((len(prompts), longest), np.int64), np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if left else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


@pytest.mark.parametrize("options", MODES)
def test_a_batch_of_unequal_prompts_is_what_transformers_gives_each_alone(llama: Any, options: dict[str, Any]) -> None:
    model, folder = llama
    engine = open_engine(folder)
    same = {"num_beams" if name == "beams" else name: value for name, value in options.items()}
    want = [theirs(model, prompt, 24, **same) for prompt in PROMPTS]
    sampling = Sampling(max_new_tokens=24, **options)
    assert completions(engine, PROMPTS, sampling) == want
    assert [completions(engine, [prompt], sampling)[0] for prompt in PROMPTS] == want


def test_genai_reads_the_same_folder_and_gives_the_same_tokens(llama: Any) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    _, folder = llama
    genai = og.Model(str(folder))
    for prompt in PROMPTS:
        params = og.GeneratorParams(genai)
        params.set_search_options(max_length=len(prompt) + 16, do_sample=False)
        generator = og.Generator(genai, params)
        generator.append_tokens(np.array([prompt], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        judge = [int(token) for token in generator.get_sequence(0)][len(prompt) :]
        assert completions(open_engine(folder), [prompt], Sampling(max_new_tokens=16))[0] == judge


@pytest.mark.parametrize("left", [True, False])
def test_run_gives_the_logits_of_every_token_with_padding_on_either_side(llama: Any, left: bool) -> None:
    model, folder = llama
    ids, mask = padded(PROMPTS, left)
    logits = open_engine(folder).run({"input_ids": ids.astype(np.int32), "attention_mask": mask})["logits"]
    assert logits.shape == (4, 7, models.VOCAB)
    assert logits.dtype == np.float32
    for row, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            judge = model(torch.tensor([prompt])).logits[0].numpy()
        np.testing.assert_allclose(logits[row][mask[row] == 1], judge, atol=2e-4)


def test_a_prompt_read_in_chunks_gives_the_same(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = llama
    prompt = [5 + i * 7 % 300 for i in range(50)]
    monkeypatch.setattr(ort_cache, "_SHORTEST_CHUNK", 16)
    monkeypatch.setattr(ort_cache, "_LOGITS_BYTES", 0)
    got = completions(open_engine(folder), [prompt, *PROMPTS], Sampling(max_new_tokens=12))
    assert got == [theirs(model, p, 12) for p in (prompt, *PROMPTS)]


def test_two_generations_at_once_do_not_meet(llama: Any) -> None:
    _, folder = llama
    engine = open_engine(folder)
    sampling = Sampling(max_new_tokens=10, eos_token_ids=())
    alone = [completions(engine, [prompt], sampling)[0] for prompt in PROMPTS[:2]]
    pairs = zip(*(engine.generate([prompt], sampling) for prompt in PROMPTS[:2]), strict=True)
    assert [list(tokens) for tokens in zip(*((a.token_id, b.token_id) for a, b in pairs), strict=True)] == alone


def test_the_end_of_the_context_ends_a_generation(llama: Any) -> None:
    _, folder = llama
    engine = open_engine(folder)
    prompt = [7] * 250
    assert len(completions(engine, [prompt], Sampling(max_new_tokens=20, eos_token_ids=()))[0]) == 6
    with pytest.raises(RecipeError, match="256 tokens, and the engine's context ends at 256"):
        completions(engine, [[7] * 256], Sampling())


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"input_ids": np.array([[1, 2]]), "position_ids": np.array([[0, 1]])}, "takes input_ids and attention_mask"),
        ({}, "not nothing"),
        ({"input_ids": np.array([1, 2])}, "must both be"),
        ({"input_ids": np.array([[1, 2]]), "attention_mask": np.array([[1]])}, "must both be"),
        ({"input_ids": np.array([[1, 5000]])}, "the vocabulary has 320 tokens"),
        ({"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.array([[1, 0, 1]])}, "padding between tokens"),
        ({"input_ids": np.array([[1, 2]]), "attention_mask": np.array([[0, 0]])}, "without tokens"),
    ],
)
def test_inputs_that_a_decoder_cannot_take(llama: Any, inputs: dict[str, Array], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        open_engine(llama[1]).run(inputs)


def test_prompts_that_a_decoder_cannot_take(llama: Any) -> None:
    engine = open_engine(llama[1])
    for prompts, words in (
        ([[1], []], "prompt 1 is empty"),
        ([[1, 320]], "vocabulary ends at 319"),
        ({"input_ids": np.ones((1, 2), np.int64)}, "lists of token ids"),
    ):
        with pytest.raises(RecipeError, match=words):
            completions(engine, prompts, Sampling())  # type: ignore[arg-type]


def test_a_cache_in_half_precision(llama: Any, tmp_path: Path) -> None:
    model, engine = llama
    inputs = {"model": engine.parent / "model", "export": engine.parent / "export"}
    onnx_weights.run(inputs, onnx_weights.WeightOptions(precision="fp16", threads=1), tmp_path, silent)
    half: Any = open_engine(tmp_path)
    assert half._graph.dtype("past_key_values.0.key") == np.float16
    ids, mask = padded(PROMPTS, left=True)
    logits = half.run({"input_ids": ids, "attention_mask": mask})["logits"]
    assert logits.dtype == np.float32
    for row, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            judge = model(torch.tensor([prompt])).logits[0].numpy()
        np.testing.assert_allclose(logits[row][mask[row] == 1], judge, atol=0.1)
    for options in ({}, {"beams": 3}):
        got = completions(half, PROMPTS, Sampling(max_new_tokens=8, eos_token_ids=(), **options))
        assert got == [
            completions(half, [prompt], Sampling(max_new_tokens=8, eos_token_ids=(), **options))[0]
            for prompt in PROMPTS
        ]


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_encoder_decoders_are_what_transformers_gives(name: str, tmp_path: Path) -> None:
    folder = getattr(models, name)(tmp_path / "model")
    (tmp_path / "export").mkdir()
    (tmp_path / "engine").mkdir()
    onnx_torch.run({"model": folder}, onnx_torch.TorchExportOptions(), tmp_path / "export", silent)
    inputs = {"model": folder, "export": tmp_path / "export"}
    onnx_weights.run(inputs, onnx_weights.WeightOptions(precision="fp32", threads=1), tmp_path / "engine", silent)
    engine: Any = open_engine(tmp_path / "engine")
    speech = name == "whisper"
    kind = transformers.WhisperForConditionalGeneration if speech else transformers.T5ForConditionalGeneration
    model = kind.from_pretrained(folder).eval()
    features = np.random.default_rng(0).normal(0, 1, (3, 16, 100)).astype(np.float32)
    prompts: Any = {"input_features": features} if speech else PROMPTS
    given = (
        [{"input_features": torch.tensor(each[None])} for each in features]
        if speech
        else [{"input_ids": torch.tensor([ids])} for ids in PROMPTS]
    )
    for beams in (1, 4):
        got: list[list[int]] = [[] for _ in given]
        for token in engine.generate(prompts, Sampling(max_new_tokens=20, beams=beams)):
            got[token.prompt].append(token.token_id)
        # Whisper's own generate() adds suppressed tokens and timestamps; this is the loop below it.
        generate = transformers.GenerationMixin.generate
        judge = [generate(model, **each, max_new_tokens=20, do_sample=False, num_beams=beams)[0, 1:] for each in given]
        assert got == [ids.tolist() for ids in judge]


class NumpyStepper:
    """Reads every sequence again, through a function of the whole sequence: [T] ids -> [T, V] logits."""

    def __init__(self, logits: Any) -> None:
        self._logits = logits

    def prefill(self, prompts: Sequence[list[int]], room: int) -> tuple[list[tuple[int, list[int]]], Array]:
        state = [(owner, list(ids)) for owner, ids in enumerate(prompts)]
        return state, self._last(state)

    def step(self, state: list[tuple[int, list[int]]], tokens: Sequence[int], rows: Sequence[int]) -> Array:
        state[:] = [(state[row][0], [*state[row][1], token]) for row, token in zip(rows, tokens, strict=True)]
        return self._last(state)

    def _last(self, state: list[tuple[int, list[int]]]) -> Array:
        return np.stack([self._logits(owner, ids)[-1] for owner, ids in state]).astype(np.float32)


def by_numpy(logits: Any, history: Sequence[list[int]], sampling: Sampling) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in history]
    for token in decode(NumpyStepper(logits), history, history, sampling, eos_token_ids=[toys.EOS]):
        out[token.prompt].append(token.token_id)
    return out


@pytest.mark.parametrize("options", MODES)
def test_a_cache_that_is_concatenated(tmp_path: Path, options: dict[str, Any]) -> None:
    engine = open_engine(toys.decoder(tmp_path))
    lengths: set[tuple[int, ...]] = set()
    for eos in ((), *((token,) for token in range(toys.VOCAB))):
        sampling = Sampling(max_new_tokens=12, eos_token_ids=eos, **options)
        want = by_numpy(lambda _, ids: toys.decoder_logits(ids), TOY_PROMPTS, sampling)
        assert completions(engine, TOY_PROMPTS, sampling) == want
        lengths.add(tuple(len(ids) for ids in want))
    assert any(1 < min(row) < max(row) for row in lengths), "nothing was dropped from a running batch"


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(("dtype", "atol"), [("float", 1e-5), ("float16", 0.05)])
def test_run_over_a_concatenated_cache(tmp_path: Path, left: bool, dtype: str, atol: float) -> None:
    engine = open_engine(toys.decoder(tmp_path, dtype))
    ids, mask = padded(TOY_PROMPTS, left)
    logits = engine.run({"input_ids": ids, "attention_mask": mask})["logits"]
    assert logits.dtype == np.float32
    for row, prompt in enumerate(TOY_PROMPTS):
        np.testing.assert_allclose(logits[row][mask[row] == 1], toys.decoder_logits(prompt), atol=atol)
    generated = completions(engine, TOY_PROMPTS, Sampling(max_new_tokens=4, eos_token_ids=()))
    assert generated[0][0] == toys.decoder_logits(TOY_PROMPTS[0])[-1].argmax()


@pytest.mark.parametrize("options", MODES)
def test_text_to_text(tmp_path: Path, options: dict[str, Any]) -> None:
    engine = open_engine(toys.seq2seq(tmp_path))

    def logits(owner: int, ids: list[int]) -> Array:
        return toys.seq2seq_logits(toys.EMBED[TOY_PROMPTS[owner]], ids)

    for eos in (None, (3, 6, 9, 12)):
        sampling = Sampling(max_new_tokens=10, eos_token_ids=eos, **options)
        want = by_numpy(logits, [[toys.START]] * 3, sampling)
        assert completions(engine, TOY_PROMPTS, sampling) == want
        assert [completions(engine, [prompt], sampling)[0] for prompt in TOY_PROMPTS] == want
    ids, mask = padded(TOY_PROMPTS, left=False)
    asked = np.array([[toys.START, 7, 5]] * 3)
    got = engine.run({"input_ids": ids, "attention_mask": mask, "decoder_input_ids": asked})["logits"]
    for row in range(3):
        np.testing.assert_allclose(got[row], logits(row, asked[row].tolist()), atol=1e-5)


@pytest.mark.parametrize("options", MODES)
def test_speech_to_text(tmp_path: Path, options: dict[str, Any]) -> None:
    engine: Any = open_engine(toys.seq2seq(tmp_path, speech=True))
    features = np.random.default_rng(7).normal(0, 1, (3, toys.DIM, 9)).astype(np.float32)

    def logits(owner: int, ids: list[int]) -> Array:
        return toys.seq2seq_logits(features[owner].T, ids)

    sampling = Sampling(max_new_tokens=10, eos_token_ids=(3, 6), **options)
    for given, history in (({}, [toys.START]), ({"decoder_input_ids": np.array([[1, 8, 4]] * 3)}, [1, 8, 4])):
        out: list[list[int]] = [[], [], []]
        for token in engine.generate({"input_features": features, **given}, sampling):
            out[token.prompt].append(token.token_id)
        assert out == by_numpy(logits, [history] * 3, sampling)
    with pytest.raises(RecipeError, match="takes input_features, not token ids"):
        list(engine.generate([[1, 2]], sampling))


def test_what_an_encoder_decoder_cannot_take(tmp_path: Path) -> None:
    engine: Any = open_engine(toys.seq2seq(tmp_path))
    ids = np.array([[5, 6]])
    with pytest.raises(RecipeError, match="needs decoder_input_ids"):
        engine.run({"input_ids": ids})
    with pytest.raises(RecipeError, match="the encoder takes input_ids, attention_mask; given: input_features"):
        engine.run({"input_features": ids, "decoder_input_ids": ids})
    with pytest.raises(RecipeError, match="vocabulary ends at 15"):
        engine.run({"input_ids": ids, "decoder_input_ids": np.array([[16]])})
    with pytest.raises(RecipeError, match="prompt 1 is empty"):
        list(engine.generate([[1], []], Sampling()))


def test_one_forward_pass(tmp_path: Path) -> None:
    engine: Engine = open_engine(toys.encoder(tmp_path))
    ids, mask = padded(TOY_PROMPTS, left=False)
    out = engine.run({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.ones_like(ids)})
    assert out["last_hidden_state"].dtype == np.float32
    np.testing.assert_allclose(out["last_hidden_state"], toys.EMBED[ids] + toys.EMBED[1], atol=0.01)
    assert out["count"].ravel().tolist() == [3, 5, 1]
    short = engine.run({"input_ids": ids})
    assert short["count"].ravel().tolist() == [5, 5, 5]
    np.testing.assert_allclose(short["last_hidden_state"], toys.EMBED[ids] + toys.EMBED[0], atol=0.01)
    with pytest.raises(RecipeError, match="the engine takes input_ids, attention_mask, token_type_ids; given: pixels"):
        engine.run({"pixels": ids})
    with pytest.raises(RecipeError, match="'input_ids' is float32, and the graph takes int64"):
        engine.run({"input_ids": ids.astype(np.float32)})
    with pytest.raises(StageError, match=r"model\.onnx: ONNX Runtime failed"):
        engine.run({"input_ids": ids + 999})
    with pytest.raises(UnavailableError, match="does not generate text"):
        engine.generate([[1]], Sampling())


def test_an_engine_that_does_not_load_says_which_file(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"engine\.json is missing"):
        open_engine(tmp_path)
    toys.encoder(tmp_path)
    model, described = tmp_path / "model.onnx", json.loads((tmp_path / "engine.json").read_text())
    whole = model.read_bytes()
    model.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StageError, match=r"model\.onnx: ONNX Runtime .* cannot load it"):
        open_engine(tmp_path)
    model.unlink()
    with pytest.raises(StageError, match=r"model\.onnx is missing"):
        open_engine(tmp_path)
    model.write_bytes(whole)
    for change, words in (
        ({"runtime": "openvino"}, "not of an engine for onnxruntime"),
        ({"components": {}}, "'model' is missing or wrong"),
        ({"kind": "other"}, "unknown kind 'other'"),
    ):
        (tmp_path / "engine.json").write_text(json.dumps({**described, **change}))
        with pytest.raises(StageError, match=words):
            open_engine(tmp_path)
    (tmp_path / "engine.json").write_text("{")
    with pytest.raises(StageError, match="cannot be read"):
        open_engine(tmp_path)


def test_settings_are_strict(tmp_path: Path) -> None:
    folder = toys.encoder(tmp_path)
    for settings, words in (
        ({"thread": 1}, "did you mean 'threads'"),
        ({"threads": "2"}, "expected int"),
        ({"threads": -1}, "threads and device_id are 0 or more"),
        ({"provider": "CUDA"}, "provider is CPUExecutionProvider or CUDAExecutionProvider"),
    ):
        with pytest.raises(RecipeError) as error:
            open_engine(folder, settings)
        assert words in str(error.value)
    session: Any = open_engine(folder, {"threads": 2, "arena": True})
    options = session._graph.session.get_session_options()
    assert (options.intra_op_num_threads, options.enable_cpu_mem_arena) == (2, True)
    session = open_engine(folder)
    options = session._graph.session.get_session_options()
    assert (options.intra_op_num_threads, options.enable_cpu_mem_arena) == (1, False)


def test_a_missing_provider_is_refused_and_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    folder = toys.encoder(tmp_path)
    cuda = "CUDAExecutionProvider"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UnavailableError, match=f"has no {cuda}") as error:
        open_engine(folder, {"provider": cuda})
    assert "enginewright[onnxruntime-gpu]" in error.value.hint
    # Where it is built in and its libraries do not load, onnxruntime goes on with the CPU, with a warning at most.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [cuda, "CPUExecutionProvider"])
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda file, options, providers: real(file, options))
    with pytest.raises(UnavailableError, match="would have used CPUExecutionProvider"):
        open_engine(folder, {"provider": cuda})


def test_without_onnxruntime_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnavailableError) as error:
        open_engine(toys.encoder(tmp_path))
    assert error.value.exit_code == 5
    assert "enginewright[onnxruntime]" in str(error.value)
