"""Write docs/benchmarks.md and its plots from the figures that the other scripts left in .bench.

python bench/page.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environments
import jobs
import ov_page
import plots
import sections
import transfer_page
import trt_page
from jobs import GENAI, OLIVE, OPTIMUM, OURS
from tables import megabytes, ranged, table

Figures = Mapping[str, Any]
DOCS = environments.ROOT / "docs"
GENERATED = (
    "<!-- Written by bench/page.py from measurements. Run the scripts again instead of changing this page. -->\n"
)
PHASES = {
    "draft": "cold, `draft`",
    "cold": "cold",
    "warm": "again, nothing changed",
    "edit": "last step changed",
    "lean": "`--lean`",
    "help": "`--help`",
}

ABOUT = f"""\
How to read it:

* **CPU s** is user + system time of the whole process tree, the median of the runs with the smallest and the largest
  behind it. It is the figure to compare: wall time grows when others use the machine, CPU time hardly does.
* **Peak** is the resident memory of the largest process. **Disk** is what the job's folder held at the end, cache and
  result together, hard links counted once and those to the model's own files not at all; **result** is the finished
  model alone.
* **×** is CPU time over that of {OURS}'s whole build of the phase: above 1, {OURS} is faster.
* {OURS}'s **whole build** also runs the source checkpoint in torch at fp32 on held-out text, compares the engine with
  it (and before int8 or int4 an unquantized one), judges the gates, keeps golden inputs and writes a manifest. No peer
  does this by default: Optimum compares one random batch and warns, Olive and GenAI's builder compare nothing.
  **`draft`** makes the engines alone, from an empty cache of its own: the work that the peers do. Both are whole
  commands, measured from outside as the peers' are.

What is not comparable:

* The tools do not write the same graph. {OURS} and GenAI's builder write fused decoders, Optimum writes torch's graph
  with a cache as inputs and outputs. int8 of BERT is dynamic in all three, with different choices of operators.
* {OURS} keeps every intermediate result in its store for later builds, and so does Olive; Optimum and GenAI's builder
  keep nothing, and pay with a full run each time. What is left with **`--lean`** is in the row of that name: for BERTs
  a build from an empty cache, for decoders the build that was just made, thinned.
* {OURS}'s artifact holds tokenizer and configuration; Olive's result for a BERT is a model.onnx alone.
* Olive's default exporter does not convert all-MiniLM under transformers 5 (`forward() got multiple values for argument
  'use_cache'`); its dynamo exporter does, and is what is measured there.
* {OURS}'s parity runs here on few samples: 4 of 64 tokens for the Llamas, 32 or 64 of 64 tokens for the BERTs. The
  gates of the models with random weights are off: how close random weights come says nothing.
* What "last step changed" changes: whether embedding tables are quantized ({OURS}), whether weights have a scale for
  each channel (Olive, Optimum). {OURS} has a scale for each channel by default, the others one for the whole weight.
"""


def _exit(codes: Sequence[int]) -> str:
    return " ".join(str(code) if code == 0 else f"**{code}**" for code in codes)


def build_rows(job: Figures) -> list[list[str]]:
    """The rows of one job: phase by phase, the tools below each other."""
    rows, ours = [], job["tools"][OURS]
    for phase in ours:
        whole = ours["cold" if phase == "draft" else phase]
        for tool in jobs.TOOLS:
            if phase not in job["tools"].get(tool, {}):
                continue
            figures = job["tools"][tool][phase]
            rows.append(
                [
                    PHASES[phase],
                    f"{OURS}, whole build" if tool == OURS and phase == "cold" else tool,
                    ranged(figures, "cpu_s", 2 if figures["cpu_s"] < 1 else 1),
                    f"{figures['cpu_s'] / whole['cpu_s']:.2g}",
                    f"{figures['wall_s']:.1f}",
                    megabytes(figures["peak_bytes"]),
                    megabytes(figures["disk_bytes"]) if "disk_bytes" in figures else "",
                    megabytes(figures["output_bytes"]) if "output_bytes" in figures else "",
                    _exit(figures["exit_codes"]),
                ]
            )
    return rows


HEAD = ("", "tool", "CPU s", "×", "wall s", "peak MB", "disk MB", "result MB", "exit")


def job_section(job: Figures) -> str:
    """A job's table with what must be known to read it."""
    parts = [f"### {job['title']}", ""]
    if job["parameters"]:
        parts += [f"{job['parameters'] / 1e6:.1f} million parameters.", ""]
    parts += [table(HEAD, build_rows(job), 2), ""]
    notes = [f"{tool}: {reason}." for tool, reason in job["missing"].items()]
    notes += [job["note"]] if job["note"] else []
    ours = job["tools"][OURS]
    if "imports" in ours.get("warm", {}):
        heavy = [name for name in ours["warm"]["imports"] if name != "numpy"]
        names = " and ".join(heavy) if heavy else "neither torch nor transformers nor onnx nor onnxruntime"
        notes.append(f"{OURS}'s build with all in the store imported {names}.")
    if "steps" in ours.get("cold", {}):
        count = sum(step.split("/")[-1] == "export" for step in ours["cold"]["steps"])
        notes.append(f"{OURS}'s export ran {times(count)}.")
    parts += [" ".join(notes), ""] if notes else []
    low, high = min(job["load"]), max(job["load"])
    parts += [f"Measured on {job['date']}, {_runs(job)}, load average {low} to {high}.", ""]
    return "\n".join(parts)


def times(count: int) -> str:
    """How often."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _runs(job: Figures) -> str:
    count = next(iter(job["tools"][OURS].values()))["runs"]
    return "one run each" if count == 1 else f"{count} runs each"


@dataclass(frozen=True)
class Comparison:
    """Our draft and whole build beside one peer's run of the same job, where both succeeded."""

    job: str
    peer: str
    draft: Figures
    whole: Figures
    theirs: Figures

    @property
    def ratio(self) -> float:
        """CPU time of the peer over that of our draft."""
        return float(self.theirs["cpu_s"] / self.draft["cpu_s"])

    def row(self) -> list[str]:
        """As the table shows it."""
        cpu = [f"{each['cpu_s']:.{1 if each['cpu_s'] >= 1 else 2}f}" for each in (self.draft, self.whole, self.theirs)]
        whole = self.theirs["cpu_s"] / self.whole["cpu_s"]
        peaks = [megabytes(each["peak_bytes"]) for each in (self.draft, self.whole, self.theirs)]
        return [self.job, self.peer, *cpu, f"{self.ratio:.1f}", f"{whole:.1f}", *peaks]


COMPARED = (
    *("job", "peer", "draft", "whole build", "peer", "× draft", "× whole"),
    *("peak MB of the draft", "of the build", "of the peer"),
)


def comparisons(found: Mapping[str, Figures]) -> list[Comparison]:
    """Every job and phase that both sides finished. Only from an empty cache is a draft another thing than a build."""
    rows = []
    for job in found.values():
        for phase, ours in job["tools"][OURS].items():
            draft = job["tools"][OURS].get("draft", ours) if phase == "cold" else ours
            for tool in (OLIVE, OPTIMUM, GENAI):
                theirs = job["tools"].get(tool, {}).get(phase)
                if theirs and theirs["exit_codes"] == [0] and ours["exit_codes"] == [0]:
                    name = job["title"] if phase in ("cold", "help") else f"{job['title']}, {PHASES[phase]}"
                    rows.append(Comparison(name, tool, draft, ours, theirs))
    return rows


def reading(found: Mapping[str, Figures], decode: Figures | None) -> list[str]:
    """The results in a few lines, worst news included, computed and not remembered."""
    lines = ["CPU seconds: our draft and our whole build (with reference and parity), then the peer's.", ""]
    for title, ahead in (("Less than the peer", True), ("More than the peer", False)):
        rows = sorted((each for each in comparisons(found) if (each.ratio >= 1) == ahead), key=lambda each: -each.ratio)
        if rows:
            lines += [f"{title}, by the draft:", "", table(COMPARED, [each.row() for each in rows], 2), ""]
    for model, figures in (decode or {}).get("models", {}).items():
        torch = next(row for row in figures["rows"] if row["name"].startswith("torch"))
        fastest = [
            max((row for row in figures["rows"] if row["name"].startswith(tool)), key=lambda row: row["tokens_per_s"])
            for tool in (OURS, GENAI)
        ]
        told = " and ".join(
            f"{row['name']} with {row['tokens_per_s']:.0f} tokens/s "
            f"({row['tokens_per_s'] / torch['tokens_per_s']:.0f} times torch at fp32)"
            for row in sorted(fastest, key=lambda row: -row["tokens_per_s"])
        )
        lines += [f"Decoding {model}, the best of each tool: {told}.", ""]
    return lines


def decode_section(decode: Figures) -> str:
    """Tokens/s, time to the first token, memory."""
    parts = [
        "## Decoding",
        "",
        "On a machine that others use, CPU time a token says more than tokens/s; torch suffers most, as its threads "
        f"wait for each other. {OURS}'s int4 keeps head and embeddings in 8 bits by default and has a zero point for "
        "each group; GenAI's builder has 4 bits and none. So more weights are read for a token, and the divergence is "
        "smaller.",
        "",
    ]
    for model, figures in decode["models"].items():
        rows = [
            [
                row["name"],
                ranged(row, "tokens_per_s"),
                ranged(row, "cpu_s_per_token", 2, 1e3),
                ranged(row, "first_token_s", 0, 1e3),
                megabytes(row["peak_bytes"]),
                megabytes(row["size_bytes"]),
            ]
            for row in figures["rows"]
        ]
        parts += [
            f"### {model}",
            "",
            f"{figures['parameters'] / 1e6:.1f} million parameters, batch 1, prompt of {figures['prompt']} tokens, "
            f"{figures['new']} new tokens, {figures['threads']} threads. Median of {figures['rows'][0]['rounds']} "
            f"rounds (smallest-largest); in a round the engines run one after the other. Load average "
            f"{min(figures['load'])} to {max(figures['load'])}, {figures['date']}.",
            "",
            table(("engine", "tokens/s", "CPU ms a token", "first token ms", "peak MB", "weights MB"), rows),
            "",
        ]
    return "\n".join(parts)


def parity_section(documents: Sequence[Figures]) -> str:
    """The metrics of the recipes that ship."""
    parts = [
        "## Parity",
        "",
        "Against the checkpoint in torch at fp32, on held-out data; every gate at its default.",
        "",
    ]
    shown = {
        "kld_mean": "mean KL divergence",
        "kld_p99": "KL p99",
        "top1": "top-1",
        "perplexity_ratio": "perplexity ratio",
        "greedy_equal": "equal greedy texts",
        "cosine_mean": "mean cosine",
        "cosine_min": "least cosine",
        "max_abs_error": "largest error",
        "spearman": "Spearman",
    }
    for document in documents:
        present = [name for name in shown if name in document["targets"][0]["metrics"]]
        rows = []
        for each in document["targets"]:
            values = [
                f"{each['metrics'][name]:.6g}" if each["metrics"].get(name) is not None else "" for name in present
            ]
            gates = f"{sum(g['outcome'] == 'passed' for g in each['gates'])} of {len(each['gates'])}"
            rows.append([each["precision"], f"{each['size_bytes'] / 1e6:.1f}", *values, gates])
        head = ("precision", "MB", *(shown[name] for name in present), "gates passed")
        parts += [f"### {document['recipe']}", "", table(head, rows), ""]
    return "\n".join(parts)


def quality_section(quality: Figures) -> str:
    """int4 of GenAI's builder beside ours, judged by the same reference."""
    rows = [
        [
            row["name"],
            f"{row['size_bytes'] / 1e6:.2f}",
            f"{row['metrics']['kld_mean']:.3g}",
            f"{row['metrics']['top1']:.3f}",
            f"{row['metrics']['perplexity_ratio']:.4f}",
        ]
        for row in quality["rows"]
    ]
    return "\n".join(
        [
            "### int4 of GenAI's builder and ours",
            "",
            "Speed alone says little: the same reference of pydoc-llama judges both tools' int4 engines, run by the "
            f"same ONNX Runtime ({quality['samples']} samples).",
            "",
            table(("engine", "weights MB", "mean KL divergence", "top-1", "perplexity ratio"), rows),
            "",
        ]
    )


def encoder_quality_section(quality: Figures) -> str:
    """int8 of a BERT by every tool, judged by the same reference."""
    rows = [
        [row["name"], f"{row['size_bytes'] / 1e6:.1f}", f"{row['cosine']['mean']:.5f}", f"{row['cosine']['min']:.5f}"]
        for row in quality["rows"]
    ]
    return "\n".join(
        [
            "### int8 of MiniLM, every tool's default",
            "",
            f"Cosine of the sentence embeddings of {quality['samples']} held-out sentences with the checkpoint's in "
            "torch at fp32; the peers' hidden states are pooled as the model says.",
            "",
            table(("tool", "weights MB", "mean cosine", "least cosine"), rows),
            "",
        ]
    )


def commands_section(found: Mapping[str, Figures]) -> str:
    """What was run, by job and tool."""
    parts = [
        "## Commands",
        "",
        "```console",
        "python bench/builds.py     # makes .bench/olive and .bench/optimum where they are missing",
        "python bench/decode.py",
        "python bench/quality.py",
        "python bench/quality_encoder.py",
        "python bench/page.py",
        "```",
        "",
        "Each tool runs in a folder of its own. Recipes and workflows below `.bench/inputs` are written by the script.",
        "",
    ]
    for job in found.values():
        parts += ["<details>", f"<summary>{job['title']}</summary>", "", "```console"]
        for tool, phases in job["commands"].items():
            for phase, commands in phases.items():
                parts.append(f"# {tool}: {PHASES[phase].replace('`', '')}")
                parts += commands
        parts += ["```", "", "</details>", ""]
    return "\n".join(parts)


def versions_section(versions: Mapping[str, Mapping[str, str]]) -> str:
    """Which distributions each environment holds."""
    names = [name for name in environments.SHOWN if any(name in found for found in versions.values())]
    rows = [[name, *(found.get(name, "") for found in versions.values())] for name in names]
    return table(("", *(f"{tool}'s environment" for tool in versions)), rows)


def page(
    builds: Figures, decode: Figures | None, quality: Figures | None = None, encoder: Figures | None = None
) -> str:
    """The whole page."""
    found, machine = builds["jobs"], builds["machine"]
    busy = max(max(job["load"]) for job in found.values()) > machine["processors"]
    shared = (
        " **Other work ran on it at the same time**: wall times are longer and tokens/s fewer than on an idle machine."
        if busy
        else ""
    )
    parts = [
        GENERATED,
        "# Benchmarks",
        "",
        f"{OURS} beside [Olive](https://github.com/microsoft/Olive), "
        "[Optimum](https://github.com/huggingface/optimum-onnx) and the model builder of "
        "[ONNX Runtime GenAI](https://github.com/microsoft/onnxruntime-genai), the tools of each job in one run on "
        "one machine.",
        "",
        f"Machine: {machine['processors']} processors, {machine['arch']} ({', '.join(machine['isa'])}), "
        f"{machine['memory_gb']} GB, {machine['os']}, Python {machine['python']}, no GPU.{shared}",
        "",
        "## The results in short",
        "",
        *reading(found, decode),
        "![CPU seconds of builds](img/bench-builds.svg)",
        "",
        ABOUT,
        "## Builds",
        "",
        *(job_section(job) for job in found.values()),
    ]
    if "parity" in builds:
        parts.append(sections.marked("parity", parity_section(builds["parity"])))
    if quality:
        parts.append(sections.marked("quality", quality_section(quality)))
    if encoder:
        parts.append(sections.marked("quality-encoder", encoder_quality_section(encoder)))
    if decode:
        decoding = f"{decode_section(decode)}\n![Tokens per second](img/bench-decode.svg)"
        parts.append(sections.marked("decoding", decoding))
    parts += ["## Versions", "", versions_section(builds["versions"]), "", commands_section(found)]
    return "\n".join(parts).rstrip() + "\n"


def _read(name: str) -> Any:
    file = environments.HOME / name
    return json.loads(file.read_text("utf-8")) if file.exists() else None


def main() -> int:
    builds, decode = _read("builds.json"), _read("decode.json")
    if builds is None:
        raise SystemExit("there are no figures yet: run bench/builds.py")
    path: Path = DOCS / "benchmarks.md"
    before = sections.kept(path.read_text("utf-8")) if path.exists() else {}
    written = page(builds, decode, _read("quality.json"), _read("quality-encoder.json"))
    path.write_text(written, "utf-8")
    for name, content in before.items():
        if name not in sections.kept(written):
            sections.put(name, content, path)
    if openvino := _read("openvino.json"):
        ov_page.write(openvino, path)
    if transfer := _read("transfer.json"):
        transfer_page.write(transfer, path)
    if tensorrt := _read("tensorrt.json"):
        trt_page.write(tensorrt, path)
    plots.builds(builds["jobs"], DOCS / "img" / "bench-builds.svg")
    if decode:
        plots.decode(decode["models"], DOCS / "img" / "bench-decode.svg")
    print(path.relative_to(environments.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
