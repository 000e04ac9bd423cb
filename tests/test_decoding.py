"""Decoding against transformers: its generate() with a random Llama, its processors one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from pipeline.decoding import decode  # noqa: E402
from pipeline.decoding.choose import distribution, penalize  # noqa: E402
from pipeline.engine import Array, Sampling, Token  # noqa: E402
from pipeline.errors import RecipeError, StageError  # noqa: E402

VOCAB, EOS = 96, 2
PROMPTS = [[5, 9, 11], [7, 8, 60, 61, 62, 63, 64], [44], [33, 20, 20, 33, 20]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models: torch's threads would mostly wait for each other, for minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
        initializer_range=0.4,
    )
    return transformers.LlamaForCausalLM(config).eval()


class TorchStepper:
    """A Stepper without a cache: it keeps the sequences and reads them again. Slow and plainly right."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.batches: list[int] = []

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[list[list[int]], Array]:
        state = [list(ids) for ids in prompts]
        return state, self._logits(state)

    def step(self, state: list[list[int]], tokens: Sequence[int], rows: Sequence[int]) -> Array:
        state[:] = [[*state[row], token] for row, token in zip(rows, tokens, strict=True)]
        return self._logits(state)

    def _logits(self, sequences: list[list[int]]) -> Array:
        self.batches.append(len(sequences))
        with torch.inference_mode():
            last = [self.model(torch.tensor([ids])).logits[0, -1] for ids in sequences]
            return torch.stack(last).float().numpy()


def ours(model: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in prompts]
    for token in tokens(model, prompts, **options):
        out[token.prompt].append(token.token_id)
    return out


def tokens(model: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[Token]:
    return list(decode(TorchStepper(model), prompts, prompts, Sampling(**options), eos_token_ids=[EOS]))


def theirs(model: Any, prompt: Sequence[int], new: int, **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"eos_token_id": EOS, "do_sample": False, **options}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, pad_token_id=0, **options)
    return [int(token) for token in out[0, len(prompt) :]]


def until(ids: list[int], eos: Sequence[int]) -> list[int]:
    ends = [place for place, token in enumerate(ids) if token in eos]
    return ids[: ends[0] + 1] if ends else ids


def test_greedy_is_transformers_greedy_in_one_batch_and_singly(llama: Any) -> None:
    batch = ours(llama, PROMPTS, max_new_tokens=24)
    assert batch == [theirs(llama, p, 24) for p in PROMPTS]
    assert batch == [ours(llama, [p], max_new_tokens=24)[0] for p in PROMPTS]


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_transformers(llama: Any, penalty: float) -> None:
    got = ours(llama, PROMPTS, max_new_tokens=16, repetition_penalty=penalty)
    assert got == [theirs(llama, p, 16, repetition_penalty=penalty) for p in PROMPTS]
    assert got != ours(llama, PROMPTS, max_new_tokens=16)
    seen, scores = [3, 7, 7], np.linspace(-4, 4, 10, dtype=np.float32)
    judge = transformers.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), torch.tensor(scores[None]))
    np.testing.assert_allclose(penalize(scores, np.unique(seen), penalty), judge[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("beams", "length_penalty", "penalty", "new"),
    [(4, 1.0, 1.0, 24), (2, 1.0, 1.0, 12), (3, 0.0, 1.0, 20), (4, 2.5, 1.0, 20), (5, -1.0, 1.0, 20), (3, 1.0, 1.4, 16)],
)
def test_beams_are_transformers_beams(llama: Any, beams: int, length_penalty: float, penalty: float, new: int) -> None:
    # Random weights hardly ever choose the end: a quarter of the vocabulary ends a sequence here.
    for eos in ([EOS], list(range(2, 96, 4))):
        options = {"num_beams": beams, "length_penalty": length_penalty, "repetition_penalty": penalty}
        want = [until(theirs(llama, p, new, eos_token_id=eos, **options), eos) for p in PROMPTS]
        sampling = Sampling(
            max_new_tokens=new,
            beams=beams,
            length_penalty=length_penalty,
            repetition_penalty=penalty,
            eos_token_ids=tuple(eos),
        )
        got: list[list[int]] = [[] for _ in PROMPTS]
        for token in decode(TorchStepper(llama), PROMPTS, PROMPTS, sampling, eos_token_ids=[]):
            got[token.prompt].append(token.token_id)
            assert token.finished == (got[token.prompt] == want[token.prompt])
        assert got == want
    assert any(len(ids) < new for ids in want), "no sequence ended early: the test shows nothing"


def test_an_end_token_ends_a_prompt_and_leaves_the_batch(llama: Any) -> None:
    free = ours(llama, PROMPTS, max_new_tokens=12, eos_token_ids=())
    assert all(len(ids) == 12 for ids in free)
    eos = free[1][3]
    stepper = TorchStepper(llama)
    sampling = Sampling(max_new_tokens=12, eos_token_ids=(eos,))
    got: list[list[Token]] = [[] for _ in PROMPTS]
    for token in decode(stepper, PROMPTS, PROMPTS, sampling, eos_token_ids=[EOS]):
        got[token.prompt].append(token)
    assert [[t.token_id for t in row] for row in got] == [until(ids, [eos]) for ids in free]
    for row in got:
        assert [t.finished for t in row] == [False] * (len(row) - 1) + [True]
    lengths = [len(row) for row in got]
    assert len(got[1]) <= 4
    assert stepper.batches == [sum(length > step for length in lengths) for step in range(max(lengths))]


def test_the_log_probability_is_the_models(llama: Any) -> None:
    for token in tokens(llama, [PROMPTS[1]], max_new_tokens=1, temperature=0.7, repetition_penalty=1.5):
        with torch.inference_mode():
            judge = llama(torch.tensor([PROMPTS[1]])).logits[0, -1].double().log_softmax(-1)
        assert math.isclose(token.logprob, float(judge[token.token_id]), rel_tol=1e-5)
    beam = tokens(llama, [PROMPTS[1]], max_new_tokens=6, beams=3, eos_token_ids=())
    with torch.inference_mode():
        ids = [*PROMPTS[1], *(t.token_id for t in beam)]
        judge = llama(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    want = [float(judge[len(PROMPTS[1]) - 1 + i, t.token_id]) for i, t in enumerate(beam)]
    np.testing.assert_allclose([t.logprob for t in beam], want, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.7, "min_p": 0.05},
        {"temperature": 1.0, "top_p": 1e-6},
    ],
)
def test_what_the_filters_leave_is_what_transformers_processors_leave(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(5)
    for size in (50, 3000):
        logits = rng.normal(0, 2, size).astype(np.float32)
        logits[3] = logits[4] = logits.max()  # a tie
        processors = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(options["temperature"])])
        if "top_k" in options:
            processors.append(transformers.TopKLogitsWarper(options["top_k"]))
        if "top_p" in options:
            processors.append(transformers.TopPLogitsWarper(options["top_p"]))
        if "min_p" in options:
            processors.append(transformers.MinPLogitsWarper(options["min_p"]))
        judge = processors(torch.tensor([[1]]), torch.tensor(logits[None]).double())[0].softmax(-1).numpy()
        ids, probabilities = distribution(logits, Sampling(**options))
        got = np.zeros(size)
        got[ids] = probabilities
        # Which of equal logits a cut leaves depends on torch's sort, and so on the CPU; ours is the lower id.
        apart = logits < logits.max()
        np.testing.assert_allclose(got[apart], judge[apart], atol=1e-9)
        np.testing.assert_allclose(np.sort(got), np.sort(judge), atol=1e-9)
        assert list(got[~apart]) == sorted(got[~apart], reverse=True)


def test_draws_follow_the_distribution(llama: Any) -> None:
    options = {"temperature": 1.2, "top_k": 6}
    prompt = PROMPTS[0]
    with torch.inference_mode():
        logits = llama(torch.tensor([prompt])).logits[0, -1].float().numpy()
    ids, probabilities = distribution(logits, Sampling(**options))

    class Fixed:
        def prefill(self, prompts: Any, room: int) -> tuple[None, Array]:
            return None, logits[None]

        def step(self, state: None, tokens: Sequence[int], rows: Sequence[int]) -> Array:
            raise AssertionError("one token was asked for")

    draws = 4000
    counts = dict.fromkeys(ids.tolist(), 0)
    for seed in range(draws):
        sampling = Sampling(max_new_tokens=1, seed=seed, **options)
        (token,) = decode(Fixed(), [prompt], [prompt], sampling, eos_token_ids=[])
        counts[token.token_id] += 1
    expected = probabilities * draws
    chi2 = float(((np.array(list(counts.values())) - expected) ** 2 / expected).sum())
    assert chi2 < 25.7  # 5 degrees of freedom: exceeded once in 10 000 times; the seeds are fixed


def test_a_draw_depends_on_the_seed_and_the_prompt_only(llama: Any) -> None:
    options = {"max_new_tokens": 16, "temperature": 1.0, "top_p": 0.95, "seed": 11, "eos_token_ids": ()}
    batch = ours(llama, PROMPTS, **options)
    assert batch == ours(llama, PROMPTS, **options)
    assert batch[::-1] == ours(llama, PROMPTS[::-1], **options)
    assert batch == [ours(llama, [p], **options)[0] for p in PROMPTS]
    assert batch != ours(llama, PROMPTS, **{**options, "seed": 12})


def test_the_context_is_the_limit(llama: Any) -> None:
    sampling = Sampling(max_new_tokens=50, eos_token_ids=())
    got = list(decode(TorchStepper(llama), PROMPTS, PROMPTS, sampling, eos_token_ids=[], context_length=10))
    assert [sum(t.prompt == p for t in got) for p in range(4)] == [10 - len(p) for p in PROMPTS]
    assert [t.prompt for t in got if t.finished] == [1, 3, 0, 2]
    with pytest.raises(RecipeError, match="prompt 1 has 7 tokens"):
        list(decode(TorchStepper(llama), PROMPTS, PROMPTS, sampling, eos_token_ids=[], context_length=7))
    with pytest.raises(RecipeError, match="prompt 0 is empty"):
        list(decode(TorchStepper(llama), [[]], [[]], sampling, eos_token_ids=[]))
    assert list(decode(TorchStepper(llama), [], [], sampling, eos_token_ids=[])) == []


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"beams": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"beams": 2, "temperature": 0.5},
    ],
)
def test_options_without_meaning_are_refused_by_name(llama: Any, options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        ours(llama, PROMPTS, **options)


def test_logits_that_are_not_finite_are_an_error() -> None:
    class Broken:
        def prefill(self, prompts: Any, room: int) -> tuple[None, Array]:
            return None, np.array([[0.0, np.nan, 1.0]], np.float32)

        def step(self, state: None, tokens: Sequence[int], rows: Sequence[int]) -> Array:
            raise AssertionError

    for options in ({}, {"beams": 2}):
        with pytest.raises(StageError, match="not finite"):
            list(decode(Broken(), [[1]], [[1]], Sampling(**options), eos_token_ids=[]))
