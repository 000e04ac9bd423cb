"""Call an engine: choose its inputs, check the shapes of its outputs, and name its failures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.engine import Array, Engine
from pipeline.errors import EnginewrightError, StageError


@dataclass
class Runner:
    """Engine.run with the inputs chosen and the failures named."""

    engine: Engine
    accepts: Collection[str] | None

    def __call__(self, inputs: Mapping[str, Array], where: str) -> Mapping[str, Array]:
        if self.accepts is not None:
            missing = sorted(set(self.accepts) - set(inputs))
            if missing:
                raise StageError(
                    f"the engine takes the input '{missing[0]}', and the reference has {', '.join(inputs)}",
                    hint="the export and the reference disagree on the model's inputs: report it",
                )
            inputs = {name: inputs[name] for name in inputs if name in self.accepts}
        found: Mapping[str, Array] = guarded(lambda: self.engine.run(inputs), where)
        return found


def output(outputs: Mapping[str, Array], name: str) -> Array:
    """One output of a batch of one, [1, ...], in a type that numpy computes with."""
    if name not in outputs:
        raise StageError(f"the engine gives {', '.join(outputs) or 'nothing'}, not '{name}'", hint="report it")
    return np.asarray(outputs[name])


def same_shape(batch: Array, shape: tuple[int, ...], name: str) -> Array:
    """The one sample of a batch [1, ...]; StageError when it does not have the reference's shape."""
    if batch.shape != (1, *shape):
        raise StageError(
            f"the engine's '{name}' has shape {list(batch.shape)}, and the reference's {[1, *shape]}",
            hint="the export changed the model's outputs: report it",
        )
    result: Array = batch[0]
    return result


def guarded(call: Callable[[], Any], where: str) -> Any:
    try:
        return call()
    except EnginewrightError:
        raise
    except Exception as error:  # each runtime fails in its own way
        raise StageError(f"the engine failed on {where}: {error}", hint="see the step's log") from error
