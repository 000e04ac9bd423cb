"""The Engine over OpenVINO: opens what the openvino target built."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engine import Array, Engine, Sampling, Token
from pipeline.errors import RecipeError, StageError, UnavailableError
from pipeline.stages.openvino.settings import read_settings
from pipeline.targets.ov_decoder import OvDecoder
from pipeline.targets.ov_session import Graph, open_graph


def open_engine(folder: Path, settings: Mapping[str, Any] | None = None) -> Engine:
    """Open an engine's folder, or an artifact's: the one with engine.json. `settings` go over those in engine.json.

    Raises StageError where a file is missing or does not load, RecipeError for settings that do not exist, and
    UnavailableError where openvino or the device is not here.
    """
    engine = read_engine_json(folder)
    opened = read_settings(engine.get("settings") or {}, settings or {})
    try:
        if engine["kind"] == "encoder":
            return OvModel(open_graph(folder, engine, opened))
        if engine["kind"] == "decoder":
            return OvDecoder(folder, engine, opened)
    except (KeyError, TypeError) as error:
        raise StageError(
            f"{folder / 'engine.json'}: field {error} is missing or wrong", hint="build it again"
        ) from error
    raise StageError(f"{folder / 'engine.json'}: unknown kind {engine['kind']!r}", hint="build it with this version")


def read_engine_json(folder: Path) -> dict[str, Any]:
    """engine.json of an engine for openvino. Raises StageError naming what is wrong with it."""
    file = folder / "engine.json"
    try:
        engine = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StageError(f"{file} is missing", hint="give the folder of an engine or an artifact") from error
    except (OSError, ValueError) as error:
        raise StageError(f"{file} cannot be read: {error}", hint="run `enginewright verify` on the artifact") from error
    if not isinstance(engine, dict) or engine.get("runtime") != "openvino":
        raise StageError(f"{file} is not of an engine for openvino", hint="open it with the runtime that it names")
    return engine


class OvModel:
    """The Engine of everything that answers in one forward pass: encoders, classifiers, images."""

    # What transformers takes where these are not given.
    _DEFAULTS: Mapping[str, Any] = {"attention_mask": np.ones_like, "token_type_ids": np.zeros_like}

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._request = graph.request()
        self._lock = threading.Lock()

    @property
    def source(self) -> str:
        """`blob` or `ir`."""
        return self._graph.source

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs of the artifact's interface in, its outputs out, floats as float32.

        Without attention_mask every token counts, without token_type_ids all are of the first segment.
        """
        feeds = dict(inputs)
        for name, default in self._DEFAULTS.items():
            if name in self._graph.inputs and name not in feeds and "input_ids" in feeds:
                feeds[name] = default(feeds["input_ids"])
        if set(feeds) != set(self._graph.inputs):
            raise RecipeError(
                f"the engine takes {', '.join(self._graph.inputs)}; given: {', '.join(inputs) or 'nothing'}",
                hint="see the artifact's interface: `enginewright inspect`",
            )
        with self._lock:  # the request writes its next answers into the same memory
            return {name: np.array(value) for name, value in self._graph.infer(self._request, feeds).items()}

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Token]:
        """Refused: there is no text to generate."""
        raise UnavailableError("this engine does not generate text", hint="use `run`: it answers in one forward pass")
