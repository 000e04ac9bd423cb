"""What NVIDIA's Python bindings have: recorded from the real ones, which import without NVIDIA's libraries.

`python -m tests.targets.trt_signatures VERSION FILE` downloads the bindings of a version from the package index, gives
them empty libraries in place of libnvinfer and its parser, imports them, and writes every member of the classes that
Enginewright uses, with its signature, to FILE. Nothing of them can be called: they are only read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

CLASSES = (
    *("Builder", "IBuilderConfig", "INetworkDefinition", "OnnxParser", "ParserError", "IOptimizationProfile"),
    *("ITimingCache", "IHostMemory", "Runtime", "ICudaEngine", "IExecutionContext", "EngineInspector", "ILayer"),
    *("ITensor", "IProgressMonitor", "ILogger", "IAttentionInputLayer", "IAttention"),
)
ENUMS = (
    *("BuilderFlag", "NetworkDefinitionCreationFlag", "MemoryPoolType", "ProfilingVerbosity", "TensorIOMode"),
    *("HardwareCompatibilityLevel", "LayerInformationFormat", "LayerType", "DataType", "ComputeCapability"),
)
_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
_SYMBOLS = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry"),
    *("getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins"),
)


def record(trt: Any) -> dict[str, Any]:
    """Class -> member -> signature ("" for a property), enum -> names."""
    found: dict[str, Any] = {"classes": {}, "enums": {}}
    for name in CLASSES:
        if hasattr(trt, name):
            members = {each: getattr(getattr(trt, name), each) for each in dir(getattr(trt, name))}
            found["classes"][name] = {
                each: _signature(value)
                for each, value in members.items()
                if not each.startswith("_") or each == "__init__"
            }
    for name in ENUMS:
        if hasattr(trt, name):
            found["enums"][name] = [each for each in dir(getattr(trt, name)) if each.isupper()]
    return found


def _signature(value: Any) -> str:
    lines = [line for line in (getattr(value, "__doc__", "") or "").splitlines() if "->" in line and "(" in line]
    return lines[0].strip() if callable(value) and lines else ""


def of_version(version: str) -> dict[str, Any]:
    """Download, import in a child process, record."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, major = Path(scratch), version.partition(".")[0]
        get = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "-d", scratch]
        subprocess.run([*get, f"tensorrt_cu13_bindings=={version}"], check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract("tensorrt_bindings/tensorrt.so", folder)
        source = folder / "empty.c"
        source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in _SYMBOLS))
        for library in _LIBRARIES:
            name = f"lib{library}.so.{major}"
            subprocess.run(["cc", "-shared", "-fPIC", source, "-o", folder / name, f"-Wl,-soname,{name}"], check=True)
        code = (
            "import json, os, sys; sys.setdlopenflags(os.RTLD_LAZY); sys.path.insert(0, sys.argv[1]); import tensorrt; "
            "from tests.targets.trt_signatures import record; print(json.dumps(record(tensorrt)))"
        )
        environment = {**os.environ, "LD_LIBRARY_PATH": scratch}
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder / "tensorrt_bindings")],
            check=True, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        return {"version": version, **json.loads(done.stdout)}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(of_version(sys.argv[1]), indent=1, sort_keys=True) + "\n", "utf-8")
