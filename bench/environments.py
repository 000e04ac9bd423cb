"""Make the peers' environments, each in a virtual environment of its own below `.bench`.

    python bench/environments.py                    make those that are missing
    python bench/environments.py --only olive

They do not install beside each other or beside Enginewright: optimum-onnx caps transformers, and Olive's model builder
needs an older ONNX Runtime GenAI.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOME = ROOT / ".bench"
TORCH = "torch==2.13.0"  # first, alone and exact: any other way may pull gigabytes of CUDA

# What is not a dependency but is needed, and pins without which the commands fail:
# - olive-ai imports requests without declaring it; pydantic 2.14 breaks its evaluators; onnxruntime-genai other than
#   0.14 breaks its ModelBuilder pass; onnxruntime and tabulate are needed and undeclared.
# - optimum-onnx caps transformers below 4.58.
# - optimum-intel asks for torchvision, which would replace torch by one for CUDA (6 GB). It exports text without it.
PACKAGES = {
    "olive": (
        "olive-ai==0.13.0",
        "onnxruntime==1.31.1",
        "onnxruntime-genai==0.14.1",
        "onnxscript==0.7.2",
        "pydantic==2.12.5",
        "requests",
        "tabulate",
        "datasets",
    ),
    "oras": ("oras==0.2.43",),
    "optimum": ("optimum-onnx==0.1.0", "onnxruntime==1.31.1", "onnx", "onnxscript"),
    "optimum-intel": ("optimum-intel[openvino]==2.2.0",),
}
SHOWN = (
    "olive-ai",
    "optimum",
    "optimum-onnx",
    "optimum-intel",
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "openvino",
    "openvino-genai",
    "openvino-tokenizers",
    "nncf",
)
"""The distributions whose versions the page names."""


def python_of(name: str) -> Path:
    """Where the interpreter of an environment made here is."""
    return HOME / name / "bin" / "python"


def make(name: str) -> Path:
    """Create the environment unless it is complete; returns its interpreter."""
    python, ready = python_of(name), HOME / name / ".ready"
    if ready.exists():
        return python
    print(f"installing {name} into {python.parents[1]}", flush=True)
    venv.create(python.parents[1], with_pip=True, clear=True)
    # torch is named again beside the others, or torchvision replaces it; what torchvision then is does not load.
    for packages in ((TORCH,), (TORCH, *PACKAGES[name])) if name != "oras" else (PACKAGES[name],):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    ready.touch()
    return python


def versions(python: Path) -> dict[str, str]:
    """The installed version of each distribution in SHOWN; asked in that interpreter."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    import json

    printed = subprocess.run([python, "-c", code, *SHOWN], check=True, capture_output=True, text=True).stdout
    return dict(json.loads(printed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(PACKAGES))
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else PACKAGES:
        python = make(name)
        print(f"{name}: {', '.join(f'{key} {value}' for key, value in versions(python).items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
