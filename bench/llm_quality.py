"""What W4A16 costs the trained Llama: ours beside llm-compressor's own output, read by one reader.

    python bench/llm_quality.py --peer PYTHON

PYTHON is an interpreter with llmcompressor. Both quantize the same weights (symmetric, groups of 128) with the same
calibration token ids; each folder is dequantized by our reader and held against the fp32 model on the held-out text.
The table goes into docs/benchmarks.md between its marks.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import llm_quantize
import sections

ROOT = llm_quantize.ROOT
MODEL = ROOT / "recipes" / "models" / "pydoc-llama"
HELD_OUT = ROOT / "recipes" / "data" / "pydoc-heldout.txt"
SAMPLES, LENGTH = 64, 256


def quality(folder: Path) -> tuple[float, float]:
    """(mean KL divergence in nats, share of equal best tokens) against the fp32 model, on 16 x 256 held-out tokens."""
    import numpy as np

    from pipeline.parity import divergence
    from pipeline.stages.samples import load_encoder, windows
    from pipeline.targets.llm_torch import open_dequantized, open_transformers

    ids = windows(HELD_OUT, load_encoder(MODEL, 4096), 16, 256)
    reference, candidate = open_transformers(MODEL, {"dtype": "float32"}), open_dequantized(folder)
    scores = []
    for row in ids:
        given = {"input_ids": row[None]}
        wanted, found = (engine.run(given)["logits"][0] for engine in (reference, candidate))
        scores.append(divergence.score(wanted, found, row, np.ones_like(row)))
    summary = divergence.summarise(scores)
    return summary["kld_mean"], summary["top1"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="an interpreter with llmcompressor")
    parser.add_argument("--scratch", type=Path, default=ROOT / ".bench" / "llm-quality")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    scratch = arguments.scratch.absolute()
    rows = []
    for method in ("rtn", "awq", "gptq"):
        place = scratch / method
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        told = (MODEL, method, place, SAMPLES, LENGTH)
        cells = []
        ours, theirs = place / f"ours-{method}" / "quantized" / "out", place / f"peer-{method}"
        for tool, folder in (("Enginewright", ours), ("llm-compressor", theirs)):
            cost = llm_quantize.ours(*told) if folder == ours else llm_quantize.theirs(arguments.peer, *told)
            if cost.exit_code:
                cells.append("failed")
            else:
                kld, top1 = quality(folder)
                cells.append(f"{kld:.3e}, {top1:.4f}, {cost.cpu_s:.0f} CPU s")
            print(method, tool, cells[-1], flush=True)
        rows.append(f"| {method} | {' | '.join(cells)} |")
    version = subprocess.run(
        [arguments.peer, "-c", "import importlib.metadata as m; print(m.version('llmcompressor'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    table = [
        "`python bench/llm_quality.py --peer PYTHON`: mean KL divergence in nats, top-1, CPU time of the quantization.",
        "",
        f"| W4A16, symmetric, groups of 128 | Enginewright | llm-compressor {version} |",
        "|---|---|---|",
        *rows,
    ]
    text = "\n".join(table)
    sections.put("llm-quality", f"## LLM checkpoints\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
