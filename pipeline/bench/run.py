"""Measure artifacts beside each other: a child process each, a turn each, round after round.

The machine's mood (a busy neighbour, a warm CPU) falls on all of them alike, which is why ratios of one run hold where
seconds of two runs do not. What is reported is the median over the rounds, with the least and the most.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pipeline
from pipeline.errors import BY_EXIT_CODE, StageError
from pipeline.frozen import frozen

CHILD = (sys.executable, "-P", "-m", "pipeline.bench.child")
ROOT = str(Path(pipeline.__file__).parents[1])


@frozen
class Case:
    """What is measured."""

    batch: int
    prompt: int
    """Tokens of each prompt, or of each text of an encoder."""
    new: int
    """Tokens that are generated after each prompt; an encoder has none."""

    @property
    def label(self) -> str:
        return f"batch {self.batch}, prompt {self.prompt}" + (f", new {self.new}" if self.new else "")


@dataclass
class Measured:
    """An artifact's figures: metric -> one value a round, case by case."""

    artifact: Path
    kind: str
    open_s: float
    peak_rss_bytes: int = 0
    rounds: dict[Case, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, case: Case, answer: Mapping[str, Any]) -> None:
        """Take one round in."""
        self.peak_rss_bytes = max(self.peak_rss_bytes, int(answer["peak_rss_bytes"]))
        row = self.rounds.setdefault(case, {})
        for name, value in _metrics(case, answer).items():
            row.setdefault(name, []).append(value)

    def summary(self) -> list[dict[str, Any]]:
        """A row a case: {batch, prompt, new, metrics: {name: {median, min, max}}}."""
        return [
            {
                "batch": case.batch, "prompt": case.prompt, "new": case.new,
                "metrics": {
                    name: {"median": median(values), "min": min(values), "max": max(values)}
                    for name, values in row.items()
                },
            }
            for case, row in self.rounds.items()
        ]  # fmt: skip


def _metrics(case: Case, answer: Mapping[str, Any]) -> dict[str, float]:
    if "pass_s" in answer:
        return {"texts_per_s": case.batch / answer["pass_s"], "latency_s": answer["pass_s"]}
    found = {"first_token_s": answer["first_s"], "prefill_tokens_per_s": case.batch * case.prompt / answer["first_s"]}
    if case.new > 1:
        found["decode_tokens_per_s"] = case.batch * (case.new - 1) / answer["rest_s"]
        gaps = sorted(answer["gaps_s"])
        for percent in (50, 90, 99):
            found[f"gap_p{percent}_s"] = gaps[min(len(gaps) - 1, len(gaps) * percent // 100)]
    return found


class Child:
    """The process that holds one artifact."""

    def __init__(self, artifact: Path) -> None:
        self.artifact = artifact
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
        # Threads that wait without spinning cost llama.cpp nine tenths of its speed.
        environment.pop("OMP_WAIT_POLICY", None)
        self._process = subprocess.Popen(
            CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        opened = self.ask(open=str(artifact))
        self.kind, self.open_s = str(opened["kind"]), float(opened["open_s"])

    def ask(self, **asked: Any) -> dict[str, Any]:
        """One question, one answer. Raises what the child raised, or StageError when it died."""
        assert self._process.stdin and self._process.stdout
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise StageError(f"{self.artifact}: its process ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = BY_EXIT_CODE.get(answer["exit_code"], StageError)
            raise kind(f"{self.artifact}: {answer['error']}", hint=answer["hint"])
        return answer

    def close(self) -> None:
        """End it."""
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process.kill()
        self._process.wait()


def measure(
    artifacts: Sequence[Path], cases: Sequence[Case], rounds: int, progress: Callable[[int, int, str], None]
) -> list[Measured]:
    """Open every artifact, run every case once unmeasured, then `rounds` times in turn. Raises what engines raise."""
    with _opened(artifacts) as children:
        found = [Measured(child.artifact, child.kind, child.open_s) for child in children]
        total = (rounds + 1) * sum(len(_of(each.kind, cases)) for each in found)
        done = 0
        for turn in range(rounds + 1):
            for case in cases:
                # Nobody is always the first after the others have warmed the machine.
                order = range(len(children))
                for index in [*order[turn % len(children) :], *order[: turn % len(children)]]:
                    child, measured = children[index], found[index]
                    for fitted in _of(child.kind, [case]):
                        answer = child.ask(batch=fitted.batch, prompt=fitted.prompt, new=fitted.new, seed=turn)
                        if turn:
                            measured.add(fitted, answer)
                        done += 1
                        progress(done, total, f"{child.artifact.name}: {fitted.label}")
    return found


def _of(kind: str, cases: Sequence[Case]) -> list[Case]:
    """The cases as this kind of model has them."""
    return list(cases) if kind == "decoder" else [Case(case.batch, case.prompt, 0) for case in cases]


@contextlib.contextmanager
def _opened(artifacts: Sequence[Path]) -> Iterator[list[Child]]:
    children: list[Child] = []
    try:
        for artifact in artifacts:
            children.append(Child(artifact))  # noqa: PERF401  those that are open are closed when the next one fails
        yield children
    finally:
        for child in children:
            child.close()
