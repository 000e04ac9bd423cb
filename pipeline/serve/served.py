"""What is served: an artifact that was checked and opened, with what a client may know of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.decoding import Decoder
from pipeline.engine import Engine, Guide
from pipeline.errors import UnavailableError
from pipeline.text import load_tokenizer

GENERATES = "text-generation"
TASKS = (GENERATES, "feature-extraction", "text-classification")
"""What has an API here."""


@dataclass(frozen=True, eq=False)
class Served:
    """An open artifact. Only the scheduler's thread may call `engine`."""

    folder: Path
    name: str
    """By which clients ask for it."""
    task: str
    runtime: str
    artifact_id: str | None
    engine: Engine
    told: dict[str, Any]
    """engine.json"""

    @classmethod
    def of(cls, folder: Path, engine: Engine, manifest: dict[str, Any], name: str) -> Served:
        """Raises UnavailableError for a task that nothing here answers."""
        told = json.loads((folder / "engine.json").read_text("utf-8"))
        task = told.get("task", "")
        served = cls(folder, name, task, told.get("runtime", ""), manifest.get("artifact_id"), engine, told)
        if task not in TASKS or (task == GENERATES and served.decoder is None):
            raise UnavailableError(
                f"there is no API for {task or 'this engine'}", hint=f"what can be served: {', '.join(TASKS)}"
            )
        return served

    @cached_property
    def decoder(self) -> Decoder | None:
        """How prompts become text; None for what answers in one pass."""
        make = getattr(self.engine, "decoder", None)
        return make() if make and self.task == GENERATES else None

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    @cached_property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size if self.decoder else int(self.tokenizer.get_vocab_size())

    @cached_property
    def context_length(self) -> int | None:
        """The most tokens of prompt and answer, or of an encoder's text."""
        if self.decoder:
            return self.decoder.context_length
        config = json.loads((self.folder / "config.json").read_text("utf-8"))
        most: int | None = config.get("max_position_embeddings")
        return most

    @cached_property
    def labels(self) -> list[str]:
        """Of a classifier."""
        names = json.loads((self.folder / "config.json").read_text("utf-8")).get("id2label") or {}
        return [str(names[key]) for key in sorted(names, key=int)]

    def guide(self, schema: dict[str, Any] | None) -> Callable[[], Guide]:
        """Guides to JSON of a schema; None: to any JSON object."""
        found: Callable[[], Guide] = self._grammars.json(schema)
        return found

    @cached_property
    def _grammars(self) -> Any:
        from pipeline.serve.guide import Grammars

        assert self.decoder
        return Grammars(self.folder, self.vocab_size, self.decoder.eos_token_ids)
