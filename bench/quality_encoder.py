"""Judge the int8 of MiniLM that each tool makes by default, by one reference: cosines of sentence embeddings.

    python bench/quality_encoder.py --olive PYTHON --optimum PYTHON

Builds the job `minilm` of builds.py once with every tool and writes .bench/quality-encoder.json. The peers' graphs give
hidden states, which are pooled here as the model's own configuration says: the mean over the tokens, normalized.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import builds
import decode
import environments
import inputs
import jobs
import numpy as np
import onnxruntime

HOME = environments.HOME
MODEL = "minilm"


def embeddings(graph: Path, reference: Path) -> np.ndarray[Any, Any]:
    """Sentence embeddings [N, H] of the reference's inputs, sample by sample and without padding."""
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    outputs = [each.name for each in session.get_outputs()]
    stored = {name: np.load(reference / f"inputs.{name}.npy") for name in names}
    mask_NT = np.load(reference / "inputs.attention_mask.npy")
    found = []
    for sample, mask_T in enumerate(mask_NT):
        feeds = {name: values[sample : sample + 1, mask_T > 0] for name, values in stored.items()}
        results = dict(zip(outputs, session.run(None, feeds), strict=True))
        if "sentence_embedding" in results:
            found.append(results["sentence_embedding"][0])
        else:
            mean = results["last_hidden_state"][0].mean(0)
            found.append(mean / np.linalg.norm(mean))
    return np.stack(found)


def cosines(graph: Path, reference: Path) -> dict[str, float]:
    """How near the embeddings are to the reference's."""
    theirs = embeddings(graph, reference).astype(np.float64)
    wanted = np.load(reference / "outputs.sentence_embedding.npy").astype(np.float64)
    values = (theirs * wanted).sum(1) / np.linalg.norm(theirs, axis=1) / np.linalg.norm(wanted, axis=1)
    return {"mean": float(values.mean()), "min": float(values.min())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--olive", type=Path, help="an interpreter with Olive (default: make .bench/olive)")
    parser.add_argument("--optimum", type=Path, help="an interpreter with optimum-onnx (default: make .bench/optimum)")
    arguments = parser.parse_args()
    tools = jobs.Interpreters(
        ours=Path(sys.executable),
        olive=arguments.olive or environments.make("olive"),
        optimum=arguments.optimum or environments.make("optimum"),
    )
    inputs.model(HOME, MODEL)
    job = replace(builds.all_jobs(tools)[MODEL], id=f"{MODEL}-quality")
    folders = {}
    for one in job.attempts(HOME / "work" / job.id):
        cold = replace(one, phases=one.phases[:1])
        cost = builds.attempt(job, cold, 0)["cold"]["cost"]
        if cost.exit_code:
            raise SystemExit(f"{one.tool} failed with exit code {cost.exit_code}")
        folders[one.tool] = jobs.workspace(HOME / "work" / job.id, one.tool)
    (reference,) = (folders[jobs.OURS] / "cache" / "results").glob("reference-*/out")
    rows = []
    for tool, folder in folders.items():
        (graph,) = (folder / "out").rglob("*.onnx")
        near = cosines(graph, reference)
        size = decode.size_bytes(graph.parent)
        rows.append({"name": tool, "size_bytes": size, "cosine": near})
        print(f"{tool:14} {size / 1e6:6.1f} MB  cosine {near['mean']:.5f}, least {near['min']:.5f}")
    document = {"rows": rows, "samples": len(np.load(reference / "inputs.attention_mask.npy"))}
    (HOME / "quality-encoder.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
