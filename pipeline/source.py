"""Sources: where a model or a data file lies, and which files of a model folder count."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError
from pipeline.frozen import frozen
from pipeline.recipe import option

Read = Callable[[str], bytes]
"""The name of a small file of the folder -> its bytes."""

HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
"""How a recipe names a model on the hub."""
PACKAGE = re.compile(r"package://(?P<package>[A-Za-z_]\w*)(?:/(?P<folder>[\w./-]+))?")
"""How a recipe names a model that an installed Python package carries."""

KEPT = {".json", ".txt", ".model", ".spm", ".tiktoken", ".jinja", ".vocab", ".bpe", ".codes"}
"""Suffixes of configurations, tokenizers and templates."""
LICENCES = re.compile(r"(licen[cs]e|notice|copying)([._-].*)?", re.IGNORECASE)
SKIPPED = re.compile(
    r"readme.*|requirements.*\.txt|train.*\.json|.*_results\.json|data_config\.json|ort_config\.json|openvino.*\.json"
    r"|.*\.index\.json",
    re.IGNORECASE,
)
"""What tells of a model or of another format of it, and changes without the model changing."""
INDEX = "model.safetensors.index.json"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
OTHER_FORMATS = {".gguf": "GGUF", ".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX", ".nemo": "NeMo"}
LFS_HINT = "it is a Git LFS pointer: run `git lfs pull` in the folder"
TEXT = {".txt": "data.txt", ".text": "data.txt", ".md": "data.txt", ".jsonl": "data.jsonl", ".ndjson": "data.jsonl"}
"""Suffix of a data file -> its name in the directory that the fetch stage fills."""


@frozen(kw_only=True)
class SourceFile:
    """A file by its contents."""

    path: str = option(doc="Relative to the folder, with `/`.")
    size: int = option(doc="Size.", unit="bytes", ge=0)
    digest: str = option(doc="`sha256:<hex>` of the file.")


@frozen(kw_only=True)
class Source:
    """A pinned model or data file."""

    uri: str
    """As the manifest names it: `hf://org/name`, `package://name/folder`, or a path without this machine in it."""
    revision: str | None = None
    """The commit, 40 hex digits; None for what is on this machine."""
    files: tuple[SourceFile, ...] = ()
    """Sorted by path. A data file is one `data.txt` or `data.jsonl`."""
    location: str | None = None
    """The folder, or the data file, on this machine; None for the hub."""


def files_of_model(
    names: Iterable[str], read: Read, where: str, *, code: bool = False
) -> tuple[list[str], dict[str, Any]]:
    """Which files of a model folder count, sorted, and its parsed config.json.

    `names` are relative to the folder, with `/`; `where` is what errors call the folder; `code` takes Python files too
    (trust_remote_code). Counted: config, safetensors weights with their index, tokenizer and processor files, chat
    templates, the folders of a sentence-transformers model, licences. Raises RecipeError for what is not a safetensors
    checkpoint.
    """
    names = {name for name in names if not any(part.startswith(".") for part in name.split("/"))}
    if not names:
        raise RecipeError(f"{where} is empty", hint="give a Hugging Face model folder, or `hf://org/name`")
    if "config.json" not in names:
        raise RecipeError(
            f"{where} has no config.json", hint="give a Hugging Face model folder, the one that save_pretrained writes"
        )
    config = read_json(read, "config.json", where)
    chosen = {name for name in names if "/" not in name and _counts(name, code)}
    chosen |= _weights(names, read, where, config)
    chosen |= {name for name in names if name.startswith("additional_chat_templates/") and _counts(name, code)}
    if "modules.json" in names:
        for module in _modules(read, where):
            chosen |= _module_files(names, module, where, code)
    check_names(chosen, where)
    return sorted(chosen), config


def read_json(read: Read, name: str, where: str) -> dict[str, Any]:
    """A JSON object of the folder. Raises RecipeError with file, line and column."""
    value = _json(read, name, where)
    if not isinstance(value, dict):
        raise RecipeError(f"{where}/{name}:1: expected a JSON object, found {type(value).__name__}")
    return value


def _json(read: Read, name: str, where: str) -> Any:
    raw = read(name)
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{where}/{name}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x})") from None
    except json.JSONDecodeError as error:
        place = f"{where}/{name}:{error.lineno}:{error.colno}"
        raise RecipeError(f"{place}: not valid JSON: {error.msg}", hint=LFS_HINT if is_pointer(raw) else "") from None
    except RecursionError:
        raise RecipeError(f"{where}/{name}: not valid JSON: nested too deeply") from None


def is_pointer(head: bytes) -> bool:
    """Whether a file that starts like this stands for one that Git LFS has not brought."""
    return head.startswith(b"version https://git-lfs.")


def _counts(name: str, code: bool) -> bool:
    base = name.rpartition("/")[2]
    suffix = Path(base).suffix.lower()
    return not SKIPPED.fullmatch(base) and (
        suffix in KEPT or bool(LICENCES.fullmatch(base)) or (code and suffix == ".py")
    )


def _weights(names: set[str], read: Read, where: str, config: dict[str, Any]) -> set[str]:
    """The safetensors files that transformers would load, or a RecipeError that says what is there instead."""
    if "model.safetensors" in names:
        return {"model.safetensors"}
    if INDEX in names:
        shards = read_json(read, INDEX, where).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
            raise RecipeError(f"{where}/{INDEX}: no weight_map from tensor to file", hint="save the model again")
        for shard in sorted(set(shards.values())):
            if shard not in names:
                raise RecipeError(f"{where}/{shard} is missing: {INDEX} names it", hint="download the folder again")
        return {INDEX, *shards.values()}
    top = [name for name in sorted(names) if "/" not in name]
    if "adapter_config.json" in names:
        raise RecipeError(
            f"{where} is an adapter, not a model",
            hint="merge it first: peft's AutoPeftModelForCausalLM, merge_and_unload(), then save_pretrained()",
        )
    if other := [name for name in top if name.endswith(".safetensors")]:
        raise RecipeError(
            f"{where} has {other[0]} but no model.safetensors and no {INDEX}",
            hint="load it with transformers and save_pretrained() it",
        )
    if pickles := [name for name in top if Path(name).suffix.lower() in PICKLES and name != "training_args.bin"]:
        raise RecipeError(
            f"{where} has its weights as pickle ({pickles[0]}): opening one runs code that is in it, so it is refused",
            hint=f"convert it where you trust it: {converting_command(where, config)}",
        )
    for name in top:
        if kind := OTHER_FORMATS.get(Path(name).suffix.lower()):
            raise RecipeError(f"{where} has no safetensors weights, only {kind} ({name})", hint="give the original")
    raise RecipeError(f"{where} has no weights: no model.safetensors and no {INDEX}", hint="download the folder again")


def converting_command(where: str, config: dict[str, Any]) -> str:
    """The shell command that writes a pickle checkpoint as safetensors, into `<folder>-safetensors`."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and str(names[0]).isidentifier() else "AutoModel"
    origin = where.removeprefix("hf://").partition("@")[0]
    place = origin.rpartition("/")[2] if where.startswith("hf://") else origin.rstrip("/")
    lines = (
        f"import transformers as t; m='{origin}'; o='{place}-safetensors'",
        f"t.{name}.from_pretrained(m, use_safetensors=False, dtype='auto').save_pretrained(o)",
        "t.AutoTokenizer.from_pretrained(m).save_pretrained(o)",
    )
    return f'python -c "{"; ".join(lines)}"'


def _modules(read: Read, where: str) -> list[dict[str, Any]]:
    modules = _json(read, "modules.json", where)
    right = isinstance(modules, list) and all(isinstance(m, dict) and isinstance(m.get("path"), str) for m in modules)
    if not right:
        raise RecipeError(f"{where}/modules.json: expected a list of modules, each with a path")
    return [module for module in modules if module["path"]]


def _module_files(names: set[str], module: dict[str, Any], where: str, code: bool) -> set[str]:
    """The files of one folder of a sentence-transformers model."""
    folder = module["path"].rstrip("/") + "/"
    inside = {name for name in names if name.startswith(folder)}
    chosen = {name for name in inside if _counts(name, code) or name == f"{folder}model.safetensors"}
    pickles = sorted(name for name in inside if Path(name).suffix.lower() in PICKLES)
    if pickles and f"{folder}model.safetensors" not in chosen:
        raise RecipeError(
            f"{where}/{pickles[0]} is a pickle: opening one runs code that is in it, so it is refused",
            hint="save the model again with sentence-transformers 3 or later, which writes safetensors",
        )
    if not chosen and not str(module.get("type", "")).endswith("Normalize"):
        raise RecipeError(f"{where}/{folder}config.json is missing: modules.json names the folder")
    return chosen


def check_names(names: Iterable[str], where: str) -> None:
    """Raise RecipeError for names that not every machine can hold, or that differ only in case."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        problem = name_problem(name)
        if problem:
            raise RecipeError(f"{where}: the file name {name!a} {problem}", hint="rename the file")
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise RecipeError(f"{where}: {other} and {name} differ only in case", hint="rename or remove one")


def name_problem(name: str) -> str:
    """What is wrong with a relative file name, or nothing."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    if any(ord(letter) < 32 or ord(letter) == 127 or letter in '\\:*?"<>|' for letter in name):
        return "has a character that not every machine can hold"
    if any(part in ("", ".", "..") or part[-1] in ". " for part in name.split("/")):
        return "is not a plain relative path"
    return "" if all(len(part.encode()) <= 255 for part in name.split("/")) else "is too long"


def list_folder(folder: Path, where: str) -> dict[str, Path]:
    """The files of a model folder and of the folders directly in it: name -> path. Symbolic links are followed.

    Raises RecipeError when it is no folder or cannot be read.
    """
    try:
        if not folder.is_dir():
            what = f"{where} is a file, not a folder" if folder.exists() else f"there is no folder {where}"
            hint = "give the Hugging Face folder that holds the weights and config.json, or `hf://org/name`"
            raise RecipeError(what, hint=hint)
        found = {}
        for entry in folder.iterdir():
            if not entry.is_dir():
                found[entry.name] = entry
            elif not entry.name.startswith("."):
                found |= {f"{entry.name}/{inner.name}": inner for inner in entry.iterdir() if not inner.is_dir()}
    except PermissionError as error:
        raise RecipeError(f"{where}: not allowed to read {error.filename}", hint="check its permissions") from None
    return found


def check_file(path: Path, name: str) -> int:
    """The size of a regular file in bytes. Raises RecipeError that calls it `name`."""
    try:
        found = path.stat()
    except FileNotFoundError:
        reason = f"is a link to nowhere ({path.readlink()})" if path.is_symlink() else "does not exist"
        raise RecipeError(f"{name} {reason}", hint="paths are relative to the folder of the recipe") from None
    except OSError as error:
        raise RecipeError(f"{name}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise RecipeError(f"{name} is not a regular file")
    return found.st_size
