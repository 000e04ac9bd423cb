"""Stage `reference`: what the original checkpoint answers, in torch on the CPU in fp32.

Held-out text (or seeded random inputs) goes through the model sample by sample; language models also continue prompts
greedily. Every engine is judged against these files. The same options give the same bytes on machines with the same
instruction set, hence the scope.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.frozen import frozen
from pipeline.recipe import Task, option
from pipeline.size import Size, holding
from pipeline.step import Inputs, Progress, Stage


@frozen(kw_only=True)
class ReferenceOptions:
    """Which inputs, and how many."""

    task: Task | None = None
    """Inferred from config.json when None."""
    samples: int = option(32, "How many samples.", ge=1)
    length: int = option(256, "Length of a sample.", unit="tokens", ge=2)
    prompt_count: int = option(8, "How many prompts are continued greedily.", ge=1)
    new_tokens: int = option(32, "How far each prompt is continued.", unit="tokens", ge=1)
    seed: int = option(0, "Seed of random inputs.", ge=0)
    trust_remote_code: bool = option(False, "Run Python code that comes with the checkpoint.")
    streamed: bool = option(
        False, "Read each layer's weights as the pass arrives there: for decoders whose weights do not fit in memory."
    )
    threads: int = option(4, "Threads of torch. Fixed and not the machine's: the last bits depend on it.", ge=1)


def run(inputs: Inputs, options: ReferenceOptions, out: Path, progress: Progress) -> None:
    """Write the reference of `inputs["model"]` for the optional `data` and `prompts`. See parity/stored.py."""
    from pipeline.stages import reference_run

    reference_run.run(inputs, options, out, progress)


LOADED = holding(450, weights=1.7, logits=3)
STREAMED = holding(450, largest=1.2, layer=2.5, logits=30)
"""Eight samples go side by side."""


def need(options: ReferenceOptions, size: Size) -> int:
    """What the process holds: the model, or a layer of it."""
    return (STREAMED if options.streamed else LOADED)(options, size)


STAGE = Stage(
    "reference",
    run,
    version=1,
    tools=("torch", "transformers", "tokenizers", "numpy"),
    scope="isa",
    memory=need,
)
