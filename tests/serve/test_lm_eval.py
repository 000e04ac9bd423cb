"""lm-eval's local-completions against the server: its scores are those that torch computes."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from tests.e2e.harness import DATA, MODEL
from tests.serve.conftest import Serving

PYTHON = os.environ.get("ENGINEWRIGHT_LM_EVAL", "")
pytestmark = [
    pytest.mark.optin,
    pytest.mark.skipif(not PYTHON, reason="another environment, with lm-eval: set ENGINEWRIGHT_LM_EVAL"),
]
TASK = """\
task: pydoc_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
metadata: {{version: 1}}
"""
CHOICE = (
    'doc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}]'
)


def write_task(place: Path) -> list[int]:
    """Which of four lines goes on with the text: the right answers."""
    lines = [line for line in (DATA / "pydoc-heldout.txt").read_text("utf-8").splitlines() if len(line) > 40]
    draw = random.Random(0)
    docs = []
    for number in range(24):
        at = draw.randrange(len(lines) - 4)
        choices = [" " + lines[at + 3][:60], *(" " + draw.choice(lines)[:60] for _ in range(3))]
        answer = number % 4
        choices[0], choices[answer] = choices[answer], choices[0]
        docs.append({"text": "\n".join(lines[at : at + 3]), "choices": choices, "answer": answer})
    data = place / "choice.jsonl"
    data.write_text("\n".join(map(json.dumps, docs)))
    (place / "choice.yaml").write_text(TASK.format(data=data) + CHOICE)
    return [int(doc["answer"]) for doc in docs]  # type: ignore[call-overload]


def scored(place: Path, address: str) -> tuple[float, list[tuple[str, str, float, bool]]]:
    """(accuracy, [(context, continuation, its log probability, whether it is the greedy one)]) by lm-eval."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "home")}
    told = f"model=served,base_url={address}/v1/completions,tokenizer={MODEL},num_concurrent=4,tokenized_requests=True"
    command = [
        PYTHON, "-m", "lm_eval", "--model", "local-completions", "--model_args", told, "--tasks", "pydoc_choice",
        "--include_path", str(place), "--output_path", str(place / "out"), "--log_samples", "--batch_size", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (place / "out").rglob("results_*.json")
    (samples,) = (place / "out").rglob("samples_*.jsonl")
    found = []
    for row in map(json.loads, samples.read_text().splitlines()):
        for asked, answer in zip(row["arguments"].values(), row["resps"], strict=True):
            found.append((asked["arg_0"], asked["arg_1"], float(answer[0][0]), str(answer[0][1]) == "True"))
    return json.loads(file.read_text())["results"]["pydoc_choice"]["acc,none"], found


def test_local_completions_score_as_torch_does(ort: Serving, tmp_path: Path) -> None:
    answers = write_task(tmp_path)
    accuracy, found = scored(tmp_path, ort.address)
    assert len(found) == 4 * len(answers)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    likelihoods = []
    for context, continuation, log_prob, greedy in found:
        whole, before = (
            tokenizer(text, add_special_tokens=False).input_ids for text in (context + continuation, context)
        )
        with torch.inference_mode():
            log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        steps = [(log_probs[place - 1], whole[place]) for place in range(len(before), len(whole))]
        likelihoods.append(sum(float(row[token]) for row, token in steps))
        assert log_prob == pytest.approx(likelihoods[-1], abs=2e-3)
        assert greedy == all(int(row.argmax()) == token for row, token in steps)
    best = [max(range(4), key=lambda choice: likelihoods[4 * doc + choice]) for doc in range(len(answers))]
    assert accuracy == pytest.approx(sum(map(int.__eq__, best, answers)) / len(answers))
