"""A 7B-shaped checkpoint to Q4_K_M: our one pass beside llama.cpp's converter and quantizer, in one run.

    python bench/random_weights.py --preset llama-2-7b shape-7b
    python bench/gguf_build.py shape-7b --tree vendor/llama.cpp

TREE is llama.cpp's source with libllama built (docs/decisions/gguf.md). Prints a table, writes gguf.json to .bench and
the section of docs/benchmarks.md; the tensors of the two results are compared byte by byte. Needs 18 GB of disk. Peak
memory is ru_maxrss: llama.cpp maps its input, so pages of the file that it has read count as its memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import environments
import machine
import measure
import sections
from machine import ROOT
from tables import megabytes, table

OURS = """\
import sys
from pathlib import Path
from pipeline.stages.gguf import build as gguf_build
from pipeline.step import silent
out = Path(sys.argv[2])
out.mkdir()
told = gguf_build.BuildOptions(name="model", label=sys.argv[3])
gguf_build.run({"model": Path(sys.argv[1])}, told, out, silent)
"""
SAME = """\
import sys
from pathlib import Path
from pipeline.stages.gguf.file import read_tensors
ours, theirs = map(Path, sys.argv[1:])
a, b = read_tensors(ours), read_tensors(theirs)
equal = sum(name in b and a[name].type == b[name].type and a[name].read(ours) == b[name].read(theirs) for name in a)
print(equal, len(a), len(b))
"""


def measured(*argv: object) -> dict[str, Any]:
    """Run Python to its end: CPU seconds, seconds, peak bytes."""
    command = [sys.executable, *map(str, argv)]
    log = environments.HOME / "gguf.log"
    cost = measure.run(command, cwd=ROOT, environment={**os.environ, "PYTHONPATH": str(ROOT)}, log=log)
    if cost.exit_code:
        raise SystemExit(f"{argv[0]} ended with {cost.exit_code}: see {log}")
    return {"cpu_s": round(cost.cpu_s, 1), "wall_s": round(cost.wall_s, 1), "peak_bytes": cost.peak_bytes}


def write(result: Mapping[str, Any], file: Path = sections.PAGE) -> None:
    """Replace the section in the page of benchmarks, or put it there."""
    sections.put("gguf", section(result), file)


def section(result: Mapping[str, Any]) -> str:
    """The page's section."""
    told = result["machine"]
    rows = [
        [name, f"{row['cpu_s']:.1f}", f"{row['wall_s']:.1f}", megabytes(row["peak_bytes"])]
        for name, row in result["rows"].items()
    ]
    return "\n".join(
        [
            "## GGUF",
            "",
            f"{result['title']}, {result['input_bytes'] / 1e9:.1f} GB in bf16, to {result['label']} "
            f"({result['output_bytes'] / 1e9:.2f} GB), in one run of `bench/gguf_build.py` on {result['date']}, "
            f"{told['processors']} processors of {told['arch']}, two threads each. llama.cpp was compiled for this "
            "machine, the prebuilt library that we use for any; it needs the "
            f"{result['between_bytes'] / 1e9:.1f} GB between its two steps on disk, and its peak counts the pages of "
            f"the file that it maps. {result['equal']} of {result['tensors']} tensors of the two are equal byte by "
            "byte.",
            "",
            table(("", "CPU s", "wall s", "peak MB"), rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tree", type=Path, required=True)
    parser.add_argument("--label", default="Q4_K_M")
    parser.add_argument("--title", default="A checkpoint of the shape of Llama-2-7B", help="the model in the page")
    parser.add_argument("--scratch", type=Path, help="where the files go; a temporary folder")
    arguments = parser.parse_args()
    peer = ROOT / "bench" / "llama_cpp.py"
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        ours, plain, theirs = Path(folder) / "ours", Path(folder) / "plain.gguf", Path(folder) / "theirs.gguf"
        rows = {
            "llama.cpp, convert to bf16": measured(peer, "convert", arguments.tree, arguments.model, plain, "bf16"),
            "llama.cpp, quantize": measured(peer, "quantize", arguments.tree, plain, theirs, arguments.label),
        }
        between = plain.stat().st_size
        plain.unlink()
        rows["enginewright, both in one pass"] = measured("-c", OURS, arguments.model, ours, arguments.label)
        file = next(ours.glob("*.gguf"))
        same = subprocess.run(
            [sys.executable, "-c", SAME, str(file), str(theirs)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        result = {
            "label": arguments.label,
            "title": arguments.title,
            "date": datetime.now(UTC).date().isoformat(),
            "rows": rows,
            "equal": int(same[0]),
            "tensors": int(same[1]),
            "input_bytes": sum(shard.stat().st_size for shard in arguments.model.glob("*.safetensors")),
            "output_bytes": file.stat().st_size,
            "between_bytes": between,
            "machine": machine.describe(),
        }
    for name, row in rows.items():
        print(f"{name:36} {row['cpu_s']:8.1f} CPU s {row['wall_s']:8.1f} s {row['peak_bytes'] / 1e6:9.0f} MB")
    print(f"{result['equal']} of {result['tensors']} tensors equal, {result['output_bytes'] / 1e9:.2f} GB")
    environments.HOME.mkdir(exist_ok=True)
    (environments.HOME / "gguf.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    write(result)


if __name__ == "__main__":
    main()
