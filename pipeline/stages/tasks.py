"""What a checkpoint does, read from its folder, and how transformers loads it.

`infer_task`, `kind_of` and `check_tokenizer` import only the standard library; `load_model` imports torch and
transformers.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError, StageError
from pipeline.recipe import TASKS

KINDS = {"text-generation": "decoder", "text2text-generation": "seq2seq", "automatic-speech-recognition": "seq2seq"}
"""Tasks that are not of kind `encoder`."""

AUTO_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
}

ARCHITECTURE_ENDINGS = (
    ("ForCausalLM", "text-generation"),
    ("LMHeadModel", "text-generation"),
    ("ForMaskedLM", "fill-mask"),
    ("ForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForQuestionAnswering", "question-answering"),
    ("ForImageClassification", "image-classification"),
    ("ForSpeechSeq2Seq", "automatic-speech-recognition"),
    ("MTModel", "text2text-generation"),
    ("Model", "feature-extraction"),
)

SPEECH_TYPES = frozenset({"whisper", "speech_to_text", "moonshine"})
TEXT2TEXT_TYPES = frozenset(
    {"bart", "blenderbot", "blenderbot-small", "led", "longt5", "m2m_100", "marian", "mbart", "mt5", "pegasus"}
    | {"pegasus_x", "prophetnet", "switch_transformers", "t5", "umt5"}
)

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "source.spm"),
    *("sentencepiece.bpe.model", "tekken.json", "tiktoken.model", "merges.txt"),
)


def kind_of(task: str) -> str:
    """`decoder`, `seq2seq` or `encoder`: which contract the engine of a task follows."""
    if task not in TASKS:
        raise RecipeError(f"unknown task '{task}'", hint=f"one of: {', '.join(TASKS)}")
    return KINDS.get(task, "encoder")


def read_config(model_dir: Path) -> dict[str, Any]:
    """The checkpoint's config.json; RecipeError when it is missing or not a JSON object."""
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"{model_dir.name}: no config.json", hint="model.source must be a folder in Hugging Face format"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecipeError(f"the model's config.json is not JSON: {error}", hint="fetch the file again") from None
    if not isinstance(config, dict):
        raise RecipeError("the model's config.json is not a JSON object", hint="fetch the file again")
    return config


def infer_task(model_dir: Path) -> str:
    """Read from the folder what the checkpoint does; RecipeError names what was found when that is not clear."""
    names = ["modules.json"] if (model_dir / "modules.json").is_file() else []
    return task_of(read_config(model_dir), names, model_dir.name)


def task_of(config: Mapping[str, Any], names: Collection[str], where: str) -> str:
    """The same from a parsed config.json and the names of the folder's files; `where` is what errors call it."""
    if "modules.json" in names:
        return "feature-extraction"
    architectures = config.get("architectures") or []
    model_type = config.get("model_type", "")
    for architecture in architectures:
        if architecture.endswith("ForConditionalGeneration"):
            if model_type in SPEECH_TYPES:
                return "automatic-speech-recognition"
            if model_type in TEXT2TEXT_TYPES:
                return "text2text-generation"
            continue
        for ending, task in ARCHITECTURE_ENDINGS:
            if architecture.endswith(ending):
                return task
    found = f"architectures {architectures!r}, model_type {model_type!r}"
    raise RecipeError(
        f"{where}/config.json: cannot tell the task from {found}",
        hint=f"set model.task to one of: {', '.join(TASKS)}",
    )


def check_tokenizer(model_dir: Path, task: str) -> None:
    """RecipeError when a text task has no tokenizer files, or one whose ids go beyond the model's vocabulary."""
    if task == "image-classification":
        return
    if not any((model_dir / name).is_file() for name in TOKENIZER_FILES):
        raise RecipeError(
            f"the model folder has no tokenizer (looked for {', '.join(TOKENIZER_FILES[:5])}, ...)",
            hint="copy the tokenizer files of the base model into it",
        )
    path = model_dir / "tokenizer.json"
    config = read_config(model_dir)
    vocab_size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not path.is_file() or not isinstance(vocab_size, int):
        return
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        vocab = tokenizer["model"].get("vocab") or {}
        largest = max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1
        largest = max([largest, *(token["id"] for token in tokenizer.get("added_tokens") or [])])
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"the model's tokenizer.json is not a tokenizer file: {error!r}", hint="fetch the file again"
        ) from None
    if largest >= vocab_size:
        raise RecipeError(
            f"the model's tokenizer has the token id {largest}, but vocab_size in config.json is {vocab_size}",
            hint="the tokenizer belongs to another model, or the embeddings were not resized with it",
        )


@contextmanager
def paused_collector() -> Iterator[None]:
    """No garbage collection inside: importing and tracing make a million objects that stay. A sixth of the CPU time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Let transformers see optional packages as absent, for the time of its import: those below cost 0.7 CPU s."""
    absent = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None means "do not import"
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def load_model(model_dir: Path, task: str, trust_remote_code: bool = False) -> Any:
    """The checkpoint as a torch module: fp32, CPU, eval mode, gradients off. Offline, safetensors only.

    RecipeError when the tokenizer does not match, the model type is unknown to the installed transformers, or the
    checkpoint lacks weights that the task needs; StageError when a file is truncated or a weight is not finite.
    """
    from pipeline.stages.checkpoint import Checkpoint

    kind_of(task)
    check_tokenizer(model_dir, task)
    Checkpoint(model_dir)  # refuses pickles, missing shards and truncated files by name
    config = read_config(model_dir)
    name = AUTO_CLASSES[task]
    if task == "feature-extraction" and config.get("is_encoder_decoder"):
        name = "AutoModelForTextEncoding"
    unused = ("scipy", "sklearn") if "quantization_config" in config else ("accelerate", "scipy", "sklearn")
    with _hidden(*unused), paused_collector():
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            model, info = getattr(transformers, name).from_pretrained(
                model_dir,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
            )
        except (ValueError, KeyError, ImportError, RuntimeError, OSError) as error:
            raise _cannot_load(task, config, error) from error
    for key, stored, wanted in sorted(info["mismatched_keys"]):
        raise RecipeError(
            f"the model's weight '{key}' has shape {list(stored)}, but config.json asks for {list(wanted)}",
            hint="config.json and the weights are not of the same model",
        )
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise RecipeError(
            f"the model's weights lack {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}, "
            f"which {type(model).__name__} needs for task '{task}'",
            hint=f"choose another model.task, or a checkpoint trained for {task}",
        )
    model.eval().requires_grad_(False)
    for parameter, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise StageError(
                f"the model's weight '{parameter}' has NaN or infinite values",
                hint="the checkpoint is damaged or training diverged; download it again or use an earlier one",
            )
    return model


def _cannot_load(task: str, config: dict[str, Any], error: Exception) -> RecipeError:
    model_type = config.get("model_type")
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error) or ("auto_map" in config and isinstance(error, (ValueError, ImportError))):
        return RecipeError(
            f"model_type {model_type!r} runs Python code of the checkpoint's own",
            hint="read that code, then set model.trust_remote_code: true",
        )
    if isinstance(error, (ValueError, KeyError)):
        return RecipeError(
            f"transformers cannot load model_type {model_type!r} for task '{task}': {text}",
            hint="check model.task and model_type in config.json; a newer transformers may know the type",
        )
    return RecipeError(f"transformers cannot load the model: {text}", hint="is every file of it there?")
