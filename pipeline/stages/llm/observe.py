"""Stage llm.observe: run the checkpoint over the calibration data once and keep what its linears see.

One file a layer: for each group of linears that read the same input, the largest magnitude and the mean square of
every channel, and a sample of rows. Every target that calibrates reads these; none runs the model for them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import StageError
from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.size import holding
from pipeline.step import Inputs, Progress, Stage

Tensor = Any
THREADS = 4
"""Of torch. Fixed and not the machine's: the last bits depend on it."""


@frozen(kw_only=True)
class ObserveOptions:
    """How much of the calibration data is read."""

    samples: int = option(32, "How many samples.", ge=1)
    length: int = option(256, "Length of a sample.", unit="tokens", ge=2)
    rows: int = option(512, "How many tokens' activations are kept for the search of scales.", ge=16)
    device: str = option("cpu", "Where torch runs: cpu or cuda.")


def run(inputs: Inputs, options: ObserveOptions, out: Path, progress: Progress) -> None:
    """inputs: model, calibration. Writes layer-00000.safetensors and so on."""
    import torch

    from pipeline.stages.llm.family import read_family
    from pipeline.stages.llm.shards import clear, ready, write_shard
    from pipeline.stages.llm.walk import carried, carry, walk
    from pipeline.stages.tasks import read_config

    family = read_family(read_config(inputs["model"]))
    clear(out, lambda name: not name.endswith(".part"))
    done, hidden = carried(out)
    with reproducible():
        ids = calibration_ids(inputs, family.vocab, options.samples, options.length)
        seeded = torch.Generator().manual_seed(0)
        picked = torch.randperm(ids.numel(), generator=seeded)[: options.rows].sort().values
        names = sorted({family.reads(linear.name) for linear in family.linears})

        def visit(index: int, layer: Any, hidden_STH: Tensor, forward: Callable[[], Tensor]) -> Tensor:
            progress(index, family.layers, "layers observed")
            with watched(layer, names, picked) as seen:
                result = forward()
            entries = [ready(f"{name}.{what}", value) for name, each in seen.items() for what, value in each.items()]
            write_shard(out / f"layer-{index:05d}.safetensors", entries)
            carry(out, index, result)
            return result

        walk(inputs["model"], family, ids, visit, done=done, carried_STH=hidden, device=options.device)
    (out / f"carried-{family.layers - 1:05d}.safetensors").unlink(missing_ok=True)
    progress(family.layers, family.layers, "layers observed")


def calibration_ids(inputs: Inputs, vocab: int, samples: int, length: int) -> Tensor:
    """[S, T] int64 token ids of the calibration data."""
    import torch

    from pipeline.stages import samples as text

    encoder = text.load_encoder(inputs["model"], vocab)
    return torch.from_numpy(text.windows(text.data_file(inputs["calibration"]), encoder, samples, length))


@contextmanager
def watched(layer: Any, names: list[str], picked: Tensor) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Inside, forward passes of the layer fill the result: linear -> absmax [K], meansq [K], rows [R, K]."""
    import torch

    seen: dict[str, dict[str, Tensor]] = {}
    passed: dict[str, int] = dict.fromkeys(names, 0)

    def hook(name: str) -> Callable[..., None]:
        def observe(module: Any, args: tuple[Any, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            first = passed[name]
            inside = picked[(picked >= first) & (picked < first + len(x))].to(x.device) - first
            found = seen.setdefault(
                name, {"absmax": torch.zeros(x.shape[1]), "meansq": torch.zeros(x.shape[1]), "rows": []}
            )
            found["absmax"] = torch.maximum(found["absmax"], x.abs().amax(0).cpu())
            found["meansq"] += x.square().sum(0).cpu()
            found["rows"].append(x[inside].cpu())
            passed[name] = first + len(x)

        return observe

    handles = [layer.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for name, found in seen.items():
            found["meansq"] /= max(1, passed[name])
            found["rows"] = torch.cat(found["rows"])
            if not bool(torch.isfinite(found["absmax"]).all()):
                raise StageError(
                    f"the activations that {name} reads are not finite", hint="the checkpoint overflows in fp32"
                )


@contextmanager
def reproducible() -> Iterator[None]:
    """A fixed number of threads for the time of a stage."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


TOOLS = ("torch", "transformers", "tokenizers", "numpy")
STAGE = Stage("llm.observe", run, tools=TOOLS, scope="isa", resumable=True, memory=holding(520, layer=3))
