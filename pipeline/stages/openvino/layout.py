"""Complete an OpenVINO engine's folder: the files of model and tokenizer, engine.json, graph.pbtxt, and the rt_info.

OpenVINO GenAI's LLMPipeline reads the IR, the converted tokenizer, config.json and generation_config.json; Model Server
reads graph.pbtxt beside them; Enginewright reads engine.json: one folder serves them all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.plain import to_plain
from pipeline.stages.genai_layout import copy_model_files
from pipeline.stages.openvino.file import XML
from pipeline.stages.openvino.settings import Settings, properties
from pipeline.stages.share import share

GRAPH = """\
input_stream: "HTTP_REQUEST_PAYLOAD:input"
output_stream: "HTTP_RESPONSE_PAYLOAD:output"

node: {{
  name: "LLMExecutor"
  calculator: "HttpLLMCalculator"
  input_stream: "LOOPBACK:loopback"
  input_stream: "HTTP_REQUEST_PAYLOAD:input"
  input_side_packet: "LLM_NODE_RESOURCES:llm"
  output_stream: "LOOPBACK:loopback"
  output_stream: "HTTP_RESPONSE_PAYLOAD:output"
  input_stream_info: {{ tag_index: "LOOPBACK:0", back_edge: true }}
  node_options: {{
    [type.googleapis.com/mediapipe.LLMCalculatorOptions]: {{
      models_path: "./"
      device: "{device}"
      plugin_config: '{plugin}'
    }}
  }}
  input_stream_handler {{
    input_stream_handler: "SyncSetInputStreamHandler"
    options {{ [mediapipe.SyncSetInputStreamHandlerOptions.ext] {{ sync_set {{ tag_index: "LOOPBACK:0" }} }} }}
  }}
}}
"""
"""Model Server's graph of a language model, with the execution precision, which the IR cannot carry."""


def describe(model: Any, settings: Settings, precision: str, *, decoder: bool) -> None:
    """Put provenance and the settings that OpenVINO reads from a model into its rt_info."""
    model.set_rt_info(precision, ["enginewright", "precision"])
    model.set_rt_info(settings.execution, ["enginewright", "execution"])
    if settings.device == "CPU":
        model.set_rt_info(str(settings.dynamic_quantization), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    if decoder:
        model.set_rt_info(settings.kv_cache, ["runtime_options", "KV_CACHE_PRECISION"])


def complete(
    out: Path,
    model: Path,
    tokenizer: Path | None,
    export: Mapping[str, Any],
    settings: Settings,
    *,
    precision: str,
    quantization: Mapping[str, Any] | None,
) -> None:
    """Everything of an engine's folder but the IR. `export` says task, kind, interface, decoder and pooling."""
    copy_model_files(model, out)
    if tokenizer is not None:
        for file in sorted(tokenizer.iterdir()):
            share(file, out / file.name)
    if export["kind"] == "decoder":
        plugin = json.dumps(properties(settings, decoder=True), sort_keys=True)
        (out / "graph.pbtxt").write_text(GRAPH.format(device=settings.device, plugin=plugin), encoding="utf-8")
    engine = {
        **export,
        "components": {"model": XML},
        "runtime": "openvino",
        "precision": precision,
        "quantization": quantization,
        "settings": to_plain(settings),
        "compiled": None,
    }
    write_json(out / "engine.json", engine)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
