"""One artifact under measurement: `python -m pipeline.bench.child`. A line of JSON asks, a line of JSON answers.

{"open": folder} opens the engine; {"batch": B, "prompt": T, "new": N, "seed": s} runs one case; the end of the input
ends it. Times are of this process's own clock, so that what the parent does is not in them.

Legend: B rows, T tokens of a prompt, N new tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.engine import Sampling
from pipeline.errors import EnginewrightError


class Subject:
    """An open engine."""

    def __init__(self, folder: Path) -> None:
        from pipeline import hardware, targets

        started = time.perf_counter()
        told = json.loads((folder / "engine.json").read_text("utf-8"))
        manifest = folder / "manifest.json"
        about = json.loads(manifest.read_text("utf-8")) if manifest.is_file() else {}
        runtime = about["runtime"]["engine"] if about else told["runtime"]  # of an artifact, or of an engine in a store
        self.engine = targets.load(runtime).open(folder, hardware.probe())
        self.kind = told["kind"]
        self.vocab_size = int((told.get("decoder") or {}).get("vocab_size") or _vocabulary(folder))
        self.case({"batch": 1, "prompt": 4, "new": 1, "seed": 0})  # some runtimes compile at the first pass
        self.open_s = time.perf_counter() - started

    def case(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """One measurement: of a decoder {first_s, rest_s, gaps_s}, of an encoder {pass_s}."""
        import numpy as np

        rng = np.random.default_rng(int(asked["seed"]))
        shape = (int(asked["batch"]), int(asked["prompt"]))
        # The first ids are special tokens of nearly every vocabulary.
        ids = rng.integers(min(8, self.vocab_size - 1), self.vocab_size, shape)
        if self.kind != "decoder":
            started = time.perf_counter()
            self.engine.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})
            return {"pass_s": time.perf_counter() - started}
        sampling = Sampling(max_new_tokens=int(asked["new"]), eos_token_ids=())
        started = time.perf_counter()
        tokens = self.engine.generate(ids.tolist(), sampling)
        times = [time.perf_counter() for token in tokens if token.prompt == 0]
        ended = time.perf_counter()
        gaps = [after - before for before, after in pairwise(times)]
        return {"first_s": times[0] - started, "rest_s": ended - times[0], "gaps_s": gaps}


def _vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"])


def peak_rss_bytes() -> int:
    """Of this process and of those it started, each at its own peak (Linux)."""
    found, pids = 0, [os.getpid()]
    while pids:
        pid = pids.pop()
        try:
            status = Path(f"/proc/{pid}/status").read_text("utf-8")
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += [int(child) for child in (task / "children").read_text("utf-8").split()]
        except OSError:
            continue
        found += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return found


def main() -> int:
    """Answer until the input ends."""
    # What libraries print must not get between the answers.
    speak = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    subject: Subject | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "open" in asked:
                subject = Subject(Path(asked["open"]))
                answer = {"open_s": subject.open_s, "kind": subject.kind}
            else:
                assert subject
                answer = {**subject.case(asked), "peak_rss_bytes": peak_rss_bytes()}
        except EnginewrightError as error:
            answer = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "hint": "", "exit_code": 3}
        speak.write(json.dumps(answer) + "\n")
        speak.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
