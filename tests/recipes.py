"""A backend's options for tests of the recipe language, with a field of every kind, and a folder to read recipes in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import RecipeError, UnavailableError
from pipeline.parse import load_recipe
from pipeline.recipe import Recipe, TargetOptions, option

RUNTIMES = ("copy", "onnxruntime", "openvino")

MINIMAL = """\
name: tiny
model:
  source: model
targets:
  cpu:
    runtime: copy
"""


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """How weights are quantized."""

    method: Literal["rtn", "gptq"] = option("rtn", "The algorithm.")
    bits: Literal[4, 8] = option(4, "Width of a weight.", unit="bits")
    group_size: int = option(32, "Weights that share a scale.", unit="weights", ge=16, le=256)
    symmetric: bool = option(True, "Whether the zero point is 0.")
    damping: float = option(0.01, "Share of the mean diagonal that is added.", ge=0, le=1)

    def __post_init__(self) -> None:
        if self.method == "gptq" and self.bits == 8:
            raise RecipeError("gptq takes 4 bits", hint="set bits: 4")


@dataclass(frozen=True, kw_only=True)
class Options(TargetOptions):
    """A backend that does nothing, with a field of every kind."""

    precision: Literal["fp32", "int8"] = option("fp32", "Type of the weights.")
    quantize: Quantize | None = option(None, "Quantization of the weights.")
    skip: tuple[str, ...] = option((), "Layers that stay as they are.")
    shape: tuple[int, int] = option((1, 8), "Batch and length.", ge=1)
    threads: int | Literal["auto"] = option("auto", "Threads of a run.", ge=1)
    template: str | None = option(None, "A file.", path=True)
    session: dict[str, str] = option(dict, "Settings of the session.", key=False)


def options_of(runtime: str) -> type:
    """`copy` and `onnxruntime` are here, `openvino` is not installed."""
    if runtime == "openvino":
        raise UnavailableError("openvino is not installed", hint="pip install 'enginewright[openvino]'")
    return Options


def folder(path: Path) -> Path:
    """Fill a folder with what the test recipes name."""
    (path / "model").mkdir()
    (path / "model" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (path / "empty").mkdir()
    (path / "data").mkdir()
    (path / "data" / "heldout.txt").write_text("text\n")
    return path


def load(text: str, *overrides: str) -> Recipe:
    """Read a text as `recipe.yaml` of the current folder, as the command does."""
    Path("recipe.yaml").write_text(text, encoding="utf-8")
    return load_recipe(
        Path("recipe.yaml"),
        options_of,
        RUNTIMES,
        overrides,
        hardware=("host", "x86-64-v3", "h100"),
        metrics=("kld_mean", "kld_max", "top1"),
    )
