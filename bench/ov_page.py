"""The section of docs/benchmarks.md on OpenVINO, from the figures of bench/ov.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sections as sections_of
from tables import megabytes, ranged, table

METRICS = ("kld_mean", "top1", "perplexity_ratio")


def write(document: Mapping[str, Any], file: Path = sections_of.PAGE) -> None:
    """Replace the section in the page, or put it there."""
    sections_of.put("openvino", sections(document), file)


def sections(document: Mapping[str, Any]) -> str:
    """All parts that were measured."""
    told = document["machine"]
    versions = "; ".join(
        f"{tool}: {', '.join(f'{name} {version}' for name, version in found.items())}"
        for tool, found in document["versions"].items()
    )
    loads = [load for figures in document["models"].values() for load in figures["load"]]
    busy = ""
    if max(loads) > told["processors"]:
        busy = (
            f"**Up to {max(loads):.0f} processes wanted its {told['processors']} processors**: seconds and tokens/s by "
            "the clock are those of a busy machine, and CPU time is what to compare. "
        )
    lines = [
        "## OpenVINO",
        "",
        f"Measured by `bench/ov.py` on {document['date']}, {told['processors']} processors of {told['arch']} "
        f"({', '.join(told['isa'])}). {busy}{versions}.",
        "",
        "### int4 of decoders beside optimum-intel",
        "",
        "Both: group 128 with zero points, head and embeddings int8. A **draft** converts the tokenizer, writes the "
        "IR and compiles the blob, which optimum-intel does not; the **whole build** also runs the reference in torch, "
        "holds three engines against it, and packages. Medians, with smallest and largest; disk is cache and result.",
        "",
    ]
    rows = []
    for model, figures in document["models"].items():
        if "build" not in figures:
            continue
        found = figures["build"]
        for name in ("draft", "draft without the blob", "whole build", "optimum-intel"):
            if name not in found:
                continue
            tool = name if name == "optimum-intel" else f"Enginewright, {name}"
            peer = found["optimum-intel"]
            share = f"{found[name]['cpu_s'] / peer['cpu_s']:.2f} / {found[name]['peak_bytes'] / peer['peak_bytes']:.2f}"
            size = found["size_bytes"]["optimum-intel" if name == "optimum-intel" else "Enginewright"]
            peak = ranged(found[name], "peak_bytes", 0, 1e-6)
            disk = " / ".join(megabytes(each) for each in found["disk_bytes"][name])
            rows.append([model, tool, ranged(found[name], "cpu_s"), peak, share, megabytes(size), disk])
    head = ["model", "tool", "CPU s", "peak MB", "CPU / peak of optimum-intel's", "IR MB", "disk / result MB"]
    lines += [
        table(head, rows, right=2),
        "",
        "The same measures of both, by our Engine with one setting and one reference:",
        "",
    ]
    rows = [
        [model, side, *(f"{values[name]:.4g}" for name in METRICS)]
        for model, figures in document["models"].items()
        for side, values in figures.get("quality", {}).items()
    ]
    lines += [table(["model", "int4 by", *METRICS], rows, right=2), "", "### Decoding", ""]
    lines += ["Batch 1, 128 tokens of prompt, 64 new ones, 2 threads; every engine in each round.", ""]
    rows = [
        [
            model,
            row["name"],
            ranged(row, "tokens_per_s"),
            ranged(row, "cpu_s_per_token", 1, 1e3),
            ranged(row, "first_token_s", 0, 1e3),
            megabytes(row["peak_bytes"]),
        ]
        for model, figures in document["models"].items()
        for row in figures.get("decode", ())
    ]
    lines += [table(["model", "engine", "tokens/s", "CPU ms/token", "first token, ms", "peak MB"], rows, right=2), ""]
    lines += ["### Cold start", "", "From nothing to an open engine, and to its first answer; new processes.", ""]
    starts = {model: figures["start"] for model, figures in document["models"].items() if "start" in figures}
    if encoder := document.get("encoder"):
        starts["minilm fp32"] = encoder["start"]
    rows = [
        [
            model,
            form,
            f"{f['open_s']:.2f}",
            f"{f['open_cpu_s']:.2f}",
            f"{f['answer_s']:.2f}",
            megabytes(f["peak_bytes"]),
        ]
        for model, forms in starts.items()
        for form, f in forms.items()
    ]
    lines.append(table(["model", "from", "open, s", "open, CPU s", "first answer, s", "peak MB"], rows, right=2))
    if encoder:
        lines += [
            "",
            "### MiniLM",
            "",
            f"{encoder['samples']} held-out sentences in batches of 8; cosine and Spearman of the embeddings to the "
            "reference in torch, fp32. int8: OpenVINO's by NNCF on calibration data, ONNX Runtime's dynamic.",
            "",
        ]
        rows = [
            [
                row["name"],
                ranged(row, "sentences_per_s"),
                f"{row['cosine_mean']:.5f}",
                f"{row['cosine_min']:.4f}",
                f"{row['spearman']:.4f}",
            ]
            for row in encoder["rows"]
        ]
        lines.append(table(["engine", "sentences/s", "cosine mean", "cosine min", "Spearman"], rows))
    return "\n".join(lines) + "\n"
