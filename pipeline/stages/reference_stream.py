"""A decoder larger than memory: a layer's weights are read as the forward pass arrives, and dropped behind it.

The model is transformers' own, built on the meta device, and its numbers are those of the loaded one, bit for bit. What
costs is reading: so several passes go through it side by side, and what is read of a layer serves them all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipeline.stages.checkpoint import Checkpoint
from pipeline.stages.llm.family import EMBED, HEAD, NORM, read_family
from pipeline.stages.llm.walk import put, rows_of, skeleton, weights_of

T = TypeVar("T")
CREW = 8
"""Passes side by side: as many logits and caches are held."""
START = -1


class StoppedError(Exception):
    """Another pass failed."""


class Convoy:
    """Passes that go through a model's blocks together; one of them computes at a time."""

    def __init__(self, blocks: Sequence[tuple[Any, Callable[[], AbstractContextManager[None]]]]) -> None:
        self._weights = [weights for _, weights in blocks]
        self._changed = threading.Condition()
        self._waiting: dict[int, int] = {}
        self._live: set[int] = set()
        self._turn: int | None = None
        self._error: BaseException | None = None
        self._own = threading.local()
        for number, (module, _) in enumerate(blocks):
            module.register_forward_pre_hook(lambda *_, number=number: self._arrive(number))

    def run(self, works: Sequence[Callable[[], T]]) -> Iterator[T]:
        """Their results, in order, `CREW` at a time. The first error of one is raised."""
        for first in range(0, len(works), CREW):
            yield from self._crew(works[first : first + CREW])

    def _crew(self, works: Sequence[Callable[[], T]]) -> list[T]:
        import torch

        found: dict[int, T] = {}

        def body(number: int) -> None:
            self._own.number = number
            torch.set_num_threads(threads)  # OpenMP keeps the number by thread
            try:
                self._arrive(START)
                with torch.inference_mode():
                    found[number] = works[number]()
            except StoppedError:
                pass
            except BaseException as error:
                self._error = self._error or error
            finally:
                with self._changed:
                    self._live.discard(number)
                    self._changed.notify_all()

        threads = torch.get_num_threads()
        self._live, self._error = set(range(len(works))), None
        crew = [threading.Thread(target=body, args=(number,), daemon=True) for number in range(len(works))]
        for thread in crew:
            thread.start()
        while self._next():
            pass
        for thread in crew:
            thread.join()
        if self._error:
            raise self._error
        return [found[number] for number in range(len(works))]

    def _next(self) -> bool:
        """Let those who wait before one block through it; False when nobody is left."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) == len(self._live))
            if not self._live:
                return False
            blocks = list(self._waiting.values())
            block = max(sorted(set(blocks)), key=blocks.count)
            here = sorted(number for number, at in self._waiting.items() if at == block)
        with self._weights[block]() if block != START else _nothing():
            for number in here:
                with self._changed:
                    self._turn = number
                    self._changed.notify_all()
                    self._changed.wait_for(partial(self._passed, number))
        return True

    def _passed(self, number: int) -> bool:
        """Whether it has had its turn, and waits before another block or has ended."""
        return self._turn is None and (number in self._waiting or number not in self._live)

    def _arrive(self, block: int) -> None:
        number: int = self._own.number
        with self._changed:
            self._waiting[number] = block
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._turn == number)
            self._turn = None
            del self._waiting[number]
            if self._error:
                raise StoppedError


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def load(folder: Path) -> tuple[Any, Convoy]:
    """(transformers' model, the convoy through which alone it may be called). StageError for a missing tensor."""
    import torch
    import transformers

    checkpoint = Checkpoint(folder)
    family = read_family(checkpoint.config)
    model = skeleton(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    base = model.model
    weight = base.embed_tokens.weight
    base.embed_tokens = rows_of(checkpoint, base.embed_tokens, "cpu")
    base.embed_tokens.weight = weight  # on the meta device: its shape is asked for
    put(base.norm, "weight", torch.from_numpy(checkpoint.take(NORM).numpy()))
    blocks: list[tuple[Any, Callable[[], AbstractContextManager[None]]]] = []
    for index, layer in enumerate(base.layers):
        blocks.append((layer, partial(weights_of, layer, family.layer(index), checkpoint, "cpu")))
    name = EMBED if family.tied else HEAD

    @contextmanager
    def head() -> Iterator[None]:
        put(model.lm_head, "weight", torch.from_numpy(checkpoint.take(name).numpy()))
        try:
            yield
        finally:
            put(model.lm_head, "weight", torch.empty(0, device="meta"))

    blocks.append((model.lm_head, head))
    return model, Convoy(blocks)
