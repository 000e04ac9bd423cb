"""lm-eval's local-completions against the server: the scores that its own `hf` model gives with torch."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

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


def write_task(place: Path) -> None:
    """Which of four lines goes on with the text."""
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


def scores(place: Path, model: str, arguments: str) -> dict[str, Any]:
    out = place / f"out-{model}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "home")}
    command = [
        PYTHON, "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", "pydoc_choice",
        "--include_path", str(place), "--output_path", str(out), "--log_samples", "--batch_size", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = out.rglob("results_*.json")
    found = json.loads(file.read_text())["results"]
    samples = {}
    for each in sorted(out.rglob("samples_pydoc_choice*.jsonl")):
        for line in each.read_text().splitlines():
            row = json.loads(line)
            samples[row["doc_id"]] = [float(answer[0][0]) for answer in row["resps"]]
    return {**found, "likelihoods": samples}


def test_local_completions_score_as_torch_does(ort: Serving, tmp_path: Path) -> None:
    write_task(tmp_path)
    served = scores(
        tmp_path, "local-completions",
        f"model=served,base_url={ort.address}/v1/completions,tokenizer={MODEL},num_concurrent=4,tokenized_requests=True",
    )  # fmt: skip
    torch = scores(tmp_path, "hf", f"pretrained={MODEL},dtype=float32")
    assert served["pydoc_choice"]["acc,none"] == torch["pydoc_choice"]["acc,none"]
    assert 0 < served["pydoc_choice"]["acc,none"] < 1
    for number, values in torch["likelihoods"].items():
        assert served["likelihoods"][number] == pytest.approx(values, abs=1e-2)
