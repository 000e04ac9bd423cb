"""The work of the stage `reference`: the checkpoint in torch over samples and prompts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipeline.errors import RecipeError, StageError
from pipeline.parity.pooling import Pooling, read_pooling
from pipeline.parity.stored import NpyWriter, write_json
from pipeline.stages import reference_inputs as given
from pipeline.stages import samples as text
from pipeline.stages.reference import ReferenceOptions
from pipeline.stages.reference_inputs import Array, Reference, Sample
from pipeline.step import Inputs, Progress

T = TypeVar("T")

# Outputs of encoders with one row for each input token; they are padded as the inputs are.
_TOKEN_OUTPUTS = {
    "feature-extraction": ("last_hidden_state",),
    "fill-mask": ("logits",),
    "token-classification": ("logits",),
    "question-answering": ("start_logits", "end_logits"),
}


def run(inputs: Inputs, options: ReferenceOptions, out: Path, progress: Progress) -> None:
    """Write the reference of `inputs["model"]` for the optional `data` and `prompts`. See parity/stored.py."""
    # On a busy machine OpenMP's waiting threads otherwise burn the time of the working ones: 15 s instead of 1.2 s
    # for a model of 4 layers. It is read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    with _reproducible(torch, options.threads), torch.inference_mode():
        reference = load(inputs["model"], options)
        data, asked = (text.data_file(inputs[r]) if r in inputs else None for r in ("data", "prompts"))
        given.check(reference, options, data)
        encoder = text.load_encoder(reference.folder, reference.vocab_size) if data or asked else None
        if data is not None and encoder is not None:
            samples = given.data_samples(
                reference, options, data, encoder, lambda sample: greedy_decode(reference, sample, options.new_tokens)
            )
        else:
            samples = given.random_samples(reference, options)
        prompts: list[list[int]] | None = None
        if reference.kind != "encoder" and reference.main_input == "input_ids":
            prompts = given.prompts(reference, options, asked, encoder, samples if data else None)
        _write_inputs(samples, out)
        outputs, lengths = _write_outputs(reference, samples, out, progress)
        write_json(
            out / "reference.json",
            {
                "task": reference.task,
                "kind": reference.kind,
                "inputs": list(samples[0]),
                "outputs": outputs,
                "source": "data" if data else "random",
                "samples": len(samples),
                "eos_token_ids": list(reference.eos),
                "decoder_start_token_id": reference.start if reference.kind == "seq2seq" else None,
                "lengths": lengths,
                "kept": {},
            },
        )
        if reference.kind != "encoder":
            _write_greedy(reference, samples, prompts, options, out, progress)


def load(folder: Path, options: ReferenceOptions) -> Reference:
    """Load a checkpoint. Raises RecipeError or StageError for one that this stage cannot run."""
    from pipeline.stages import reference_stream
    from pipeline.stages.tasks import check_tokenizer, infer_task, kind_of, load_model

    task = options.task or infer_task(folder)
    convoy = None
    if options.streamed:
        check_tokenizer(folder, task)
        model, convoy = reference_stream.load(folder)
    else:
        model = load_model(folder, task, trust_remote_code=options.trust_remote_code)
    generation = getattr(model, "generation_config", None)

    def token(name: str) -> Any:
        value = getattr(generation, name, None)
        return getattr(model.config, name, None) if value is None else value

    eos, main_input = token("eos_token_id"), model.main_input_name
    if main_input not in ("input_ids", *given.NOT_TEXT):
        raise StageError(f"a model with the input '{main_input}' is not supported", hint="see the supported tasks")
    return Reference(
        model=model,
        folder=folder,
        task=task,
        kind=kind_of(task),
        main_input=main_input,
        vocab_size=0 if main_input == "pixel_values" else int(model.get_input_embeddings().weight.shape[0]),
        eos=() if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (int(eos),),
        pad=token("pad_token_id"),
        start=token("decoder_start_token_id"),
        convoy=convoy,
    )


def each(reference: Reference, works: Sequence[Callable[[], T]]) -> Iterator[T]:
    """The results of forward passes, in order: one after the other, or side by side where weights are read anew."""
    return reference.convoy.run(works) if reference.convoy else (work() for work in works)


def forward(reference: Reference, sample: Mapping[str, Array], pooling: Pooling | None, where: str) -> Sample:
    """Output name -> [t, ...] or [D] float32 of one sample. NaN or infinity raises StageError."""
    names = {"question-answering": ("start_logits", "end_logits"), "feature-extraction": ("last_hidden_state",)}
    without_cache = {} if reference.kind == "encoder" else {"use_cache": False}
    try:
        result = reference.model(**_batch(sample), **without_cache)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise StageError(
            f"the model failed on {where}: {error}",
            hint="run it in transformers to see whether the checkpoint is whole",
        ) from error
    found = {name: getattr(result, name)[0].float().numpy() for name in names.get(reference.task, ("logits",))}
    if pooling is not None:
        found["sentence_embedding"] = pooling(found["last_hidden_state"])
    for name, array in found.items():
        if np.isnan(array).any() or np.isposinf(array).any():  # -inf is how a model rules a token out
            raise StageError(
                f"the reference gives NaN or infinity in '{name}' of {where}",
                hint="the checkpoint overflows in fp32: it cannot be a reference",
            )
    return found


def greedy_decode(reference: Reference, sample: Mapping[str, Array], new_tokens: int) -> list[int]:
    """Argmax decoding of one prompt with the model's cache, without any logits processor; an end token stops it."""
    import torch

    batch = _batch({name: array for name, array in sample.items() if name != "decoder_input_ids"})
    if reference.kind == "seq2seq":
        fixed = {"encoder_outputs": reference.model.get_encoder()(**batch)}
        if "attention_mask" in batch:
            fixed["attention_mask"] = batch["attention_mask"]
        name, ids = "decoder_input_ids", torch.tensor([[reference.first]])
    else:
        fixed, name, ids = {}, "input_ids", batch["input_ids"]
    tokens: list[int] = []
    past, fed = None, ids
    while len(tokens) < new_tokens:
        result = reference.model(**fixed, **{name: fed}, past_key_values=past, use_cache=True)
        tokens.append(int(result.logits[0, -1].argmax()))
        if tokens[-1] in reference.eos:
            break
        ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], dim=1)
        past = getattr(result, "past_key_values", None)
        fed = ids if past is None else ids[:, -1:]  # a model without a cache reads everything again
    return tokens


def _batch(sample: Mapping[str, Array]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(np.ascontiguousarray(array))[None] for name, array in sample.items()}


def _write_inputs(samples: Sequence[Sample], out: Path) -> None:
    for name, first in samples[0].items():
        shape = (len(samples), max(len(sample[name]) for sample in samples), *first.shape[1:])
        with NpyWriter(out / f"inputs.{name}.npy", shape, first.dtype) as file:
            for sample in samples:
                file.append(sample[name])


def _write_outputs(
    reference: Reference, samples: Sequence[Sample], out: Path, progress: Progress
) -> tuple[list[str], dict[str, list[int]]]:
    """Run every sample; returns the names of the outputs and the lengths of all arrays that are padded."""
    pooling = read_pooling(reference.folder) if reference.task == "feature-extraction" else None
    lengths = {name: [len(sample[name]) for sample in samples] for name in samples[0] if name not in given.NOT_TEXT}
    tokens = lengths.get("decoder_input_ids", lengths.get("input_ids"))
    writers: dict[str, NpyWriter] = {}
    with ExitStack() as stack:
        works = [partial(forward, reference, sample, pooling, f"sample {i}") for i, sample in enumerate(samples)]
        progress(0, len(samples), "samples")
        for index, found in enumerate(each(reference, works)):
            for name, array in found.items():
                if name not in writers:
                    shape = array.shape
                    if tokens and (reference.kind != "encoder" or name in _TOKEN_OUTPUTS.get(reference.task, ())):
                        lengths[name] = tokens
                        shape = (max(tokens), *shape[1:])
                    file = NpyWriter(out / f"outputs.{name}.npy", (len(samples), *shape), np.float32)
                    writers[name] = stack.enter_context(file)
                writers[name].append(array)
            progress(index + 1, len(samples), "samples")
    return list(writers), lengths


def _write_greedy(
    reference: Reference,
    samples: Sequence[Sample],
    prompts: list[list[int]] | None,
    options: ReferenceOptions,
    out: Path,
    progress: Progress,
) -> None:
    if prompts is not None:
        starts = [given.text_sample(reference, np.array(prompt, np.int64)) for prompt in prompts]
    elif len(samples) < options.prompt_count:
        raise RecipeError(
            f"{options.prompt_count} samples are to be continued, and there are {len(samples)}",
            hint=f"set `prompt_count` to {len(samples)} or less",
        )
    else:
        starts = list(samples[: options.prompt_count])
    works = [partial(greedy_decode, reference, start, options.new_tokens) for start in starts]
    tokens = []
    for continued in each(reference, works):
        tokens.append(continued)
        progress(len(tokens), len(starts), "greedy continuations")
    write_json(out / "greedy.json", {"prompts": prompts, "new_tokens": options.new_tokens, "tokens": tokens})


@contextmanager
def _reproducible(torch: Any, threads: int) -> Iterator[None]:
    """A fixed number of threads, and algorithms that do not depend on timing, for the time of the stage.

    Measured: a matrix product of 7 x 3072 by 768 has other last bits with 1 thread than with 2.
    """
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
