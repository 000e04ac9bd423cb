"""The page: what is measured is shown, a failure stands out, a peer that is faster is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import page
import plots


def figures(cpu_s: float, exit_codes: list[int] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "runs": 3,
        "exit_codes": exit_codes or [0],
        "cpu_s": cpu_s,
        "cpu_s_range": [cpu_s - 0.1, cpu_s + 0.1],
        "wall_s": 2 * cpu_s,
        "wall_s_range": [cpu_s, 3 * cpu_s],
        "peak_bytes": 5e8,
        "peak_bytes_range": [5e8, 5e8],
        "disk_bytes": 3e7,
        "output_bytes": 2e7,
        **more,
    }


def document() -> dict[str, Any]:
    tools = {
        "Enginewright": {
            "draft": {**figures(4.0), "peak_bytes": 1.2e8},
            "cold": figures(10.0, steps={"model": {}, "export": {}, "cpu/engine": {}}),
            "warm": figures(0.3, imports=["numpy"]),
        },
        "Olive": {"cold": figures(8.0), "warm": figures(5.0)},
        "Optimum": {"cold": figures(3.0), "warm": figures(3.0, [1])},
    }
    job = {
        "title": "tiny: fp32 to int8",
        "note": "",
        "missing": {"GenAI builder": "builds decoders only"},
        "date": "2026-11-23",
        "load": [1.0, 4.0],
        "parameters": 4_400_000,
        "commands": {"Olive": {"cold": ["olive run --config x.json"]}},
        "tools": tools,
    }
    gate = {"metric": "kld_mean", "value": 1e-4, "threshold": 1e-3, "direction": "max", "outcome": "passed"}
    target = {"precision": "int8", "size_bytes": 7e6, "metrics": {"kld_mean": 1e-4, "top1": 0.99}, "gates": [gate]}
    return {
        "machine": {
            "processors": 2,
            "arch": "x86_64",
            "isa": ["avx2"],
            "memory_gb": 16,
            "os": "Linux",
            "python": "3.11",
        },
        "versions": {"Enginewright": {"torch": "2.13.0"}, "Olive": {"olive-ai": "0.13.0"}},
        "jobs": {"tiny": job},
        "parity": [{"recipe": "small", "targets": [target]}],
    }


def decoded() -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "rounds": 5,
            "tokens_per_s": speed,
            "tokens_per_s_range": [0.9 * speed, 1.1 * speed],
            "cpu_s_per_token": 1.5 / speed,
            "cpu_s_per_token_range": [1.4 / speed, 1.6 / speed],
            "first_token_s": 0.05,
            "first_token_s_range": [0.04, 0.06],
            "peak_bytes": 8e7,
            "size_bytes": 3e6,
        }
        for name, speed in (
            ("torch eager, fp32", 10.0),
            ("GenAI builder int4/32 in GenAI", 80.0),
            ("Enginewright int4/32 in GenAI", 100.0),
        )
    ]
    model = {"date": "2026-11-23", "load": [1.0, 2.0], "prompt": 128, "new": 64, "threads": 2, "parameters": 4e6}
    return {"models": {"small": {**model, "rows": rows}}}


def test_a_peer_that_needs_less_is_named_and_failures_are_not_compared() -> None:
    compared = {(each.job, each.peer): each for each in page.comparisons(document()["jobs"])}
    assert compared["tiny: fp32 to int8", "Optimum"].ratio == 0.75
    assert ("tiny: fp32 to int8, again, nothing changed", "Optimum") not in compared
    text = "\n".join(page.reading(document()["jobs"], None))
    worse = "| tiny: fp32 to int8 | Optimum | 4.0 | 10.0 | 3.0 | 0.8 | 0.3 | 120 | 500 | 500 |"
    assert text.index("Less than the peer") < text.index("More than the peer") < text.index(worse)


def test_page_shows_figures_failures_and_a_busy_machine() -> None:
    near = {"samples": 64, "rows": [{"name": "Olive", "size_bytes": 22.9e6, "cosine": {"mean": 0.97, "min": 0.9}}]}
    text = page.page(document(), decoded(), None, near)
    assert "| cold | Enginewright, whole build | 10.0 (9.9-10.1) | 1 |" in text
    assert "| cold, `draft` | Enginewright | 4.0 (3.9-4.1) | 0.4 |" in text
    assert "| **1** |" in text
    assert "Other work ran on it" in text
    assert "neither torch nor transformers nor onnx nor onnxruntime" in text
    assert "export ran once" in text
    assert "| 100.0 (90.0-110.0) | 15.00 (14.00-16.00) | 50 (40-60) | 80 | 3.0 |" in text
    assert "10 times torch" in text
    assert "olive run --config x.json" in text
    assert "| Olive | 22.9 | 0.97000 | 0.90000 |" in text
    assert "| int8 | 7.0 | 0.0001 | 0.99 | 1 of 1 |" in text


def test_plots_depend_on_the_figures_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plots.builds(document()["jobs"], tmp_path / name / "builds.svg")
        plots.decode(decoded()["models"], tmp_path / name / "decode.svg")
    for plot in ("builds.svg", "decode.svg"):
        first, second = (tmp_path / name / plot for name in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()
        assert first.stat().st_size < 60_000
