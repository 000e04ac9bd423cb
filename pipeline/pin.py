"""Pin a recipe's sources: branch or tag to commit, file to digest, kept in a lock file beside the recipe."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from pipeline import lock
from pipeline.digest import StatCache
from pipeline.errors import NetworkError, RecipeError, UnavailableError
from pipeline.frozen import frozen
from pipeline.recipe import Recipe
from pipeline.source import (
    HUB,
    LFS_HINT,
    PACKAGE,
    TEXT,
    Source,
    SourceFile,
    check_file,
    files_of_model,
    is_pointer,
    list_folder,
    read_json,
)
from pipeline.stages import fetch
from pipeline.step import Progress, Step, silent


@frozen
class Locked:
    """A recipe's sources, pinned."""

    model: Source
    config: Mapping[str, Any]
    """The model's config.json."""
    data: Mapping[str, Source] = field(default_factory=dict)
    """`calibration`, `parity-data` and `prompts`, as far as the recipe names them."""
    cache: Path | None = None
    offline: bool = False
    note: str = ""
    """What the user should hear: that the lock could not be written."""

    def step(self, role: str) -> Step:
        """The step that fetches `model` or one of `data`, named like its role."""
        source = self.model if role == "model" else self.data[role]
        options = fetch.FetchOptions(
            files=source.files,
            uri=source.uri,
            revision=source.revision,
            location=source.location,
            cache=str(self.cache) if self.cache else None,
            offline=self.offline,
        )
        return Step(role, fetch.STAGE, options, {})


def pin(
    recipe: Recipe,
    recipe_path: Path,
    *,
    cache: Path,
    locked: bool = False,
    offline: bool = False,
    update: bool = False,
    write: bool = True,
    progress: Progress = silent,
) -> Locked:
    """Pin the sources of a recipe that lies at `recipe_path`; write `<its stem>.lock` if it changed.

    A hub model is taken from the lock without asking the hub, as long as the recipe names the same source. Local files
    are digested (known ones are not read again). `locked`: nothing may differ from the lock, which is not written.
    `offline`: the hub is not asked. `update`: the old lock does not count. `write`: False leaves the lock as it is.
    `progress` counts bytes of the model. Raises RecipeError, NetworkError, UnavailableError, VerificationError.
    """
    if locked and update:
        raise RecipeError("--locked and --update exclude each other", hint="leave one of them out")
    where = recipe_path.with_suffix(".lock")
    old = {} if update else lock.read(where)
    if locked and not where.exists():
        raise RecipeError(f"{where} does not exist, and --locked needs it", hint="run once without --locked")
    known = StatCache(cache)
    data = {
        role: _data(path, role, recipe_path, known)
        for role, path in (
            ("calibration", recipe.calibration and recipe.calibration.path),
            ("parity-data", recipe.parity.data and recipe.parity.data.path),
            ("prompts", recipe.parity.prompts),
        )
        if path
    }
    text, code = recipe.model.source, recipe.model.trust_remote_code
    if text.startswith("hf:"):
        before = old.get("model")
        if before and before.source == text and before.code == code:
            model, config = _hub_again(before, cache, offline)
        else:
            if locked:
                what = f"pins {before.source}" if before else "pins no model"
                raise RecipeError(f"{where} {what}, the recipe names {text}", hint="run once without --locked")
            model, config = _hub(text, code, cache, offline)
    else:
        model, config = _folder(text, code, recipe_path, known, progress)
    new = {
        "model": lock.Entry(text if model.revision else model.uri, model.revision, model.files, code),
        **{role: lock.Entry(source.uri, None, source.files) for role, source in data.items()},
    }
    note = ""
    if locked:
        lock.compare(where, old, new)
    elif write:
        note = lock.write(where, new, needed=model.revision is not None)
    return Locked(model, config, data, cache, offline, note)


def _folder(
    text: str, code: bool, recipe_path: Path, known: StatCache, progress: Progress
) -> tuple[Source, dict[str, Any]]:
    """A model folder on this machine."""
    folder = _package(text) if text.startswith("package:") else recipe_path.parent / Path(text).expanduser()
    if not folder.exists() and HUB.fullmatch(f"hf://{text}"):
        raise RecipeError(f"there is no folder {text}", hint=f"for the Hugging Face hub write hf://{text}")
    found = list_folder(folder, text)

    def read(name: str) -> bytes:
        check_file(found[name], f"{text}/{name}")
        try:
            return found[name].read_bytes()
        except OSError as error:
            raise _unreadable(f"{text}/{name}", error) from None

    names, config = files_of_model(found, read, text, code=code)
    sizes = {name: check_file(found[name], f"{text}/{name}") for name in names}
    files, done, total = [], 0, sum(sizes.values())
    for name in names:
        label = f"{text}/{name}"
        if name.endswith(".safetensors") and sizes[name] < 1024 and is_pointer(read(name)):
            raise RecipeError(f"{label} has no weights", hint=LFS_HINT)
        progress(done, total, label)
        files.append(SourceFile(path=name, size=sizes[name], digest=_digest(found[name], label, known)))
        done += sizes[name]
    progress(done, total, text)
    return Source(uri=_uri(text), files=tuple(files), location=str(folder.resolve())), config


def _package(text: str) -> Path:
    """The folder that `package://name/folder` names: inside an installed Python package, which is not imported."""
    match = PACKAGE.fullmatch(text)
    if not match or ".." in text:
        raise RecipeError(f"model.source cannot be {text!r}", hint="write package://name/folder")
    spec = importlib.util.find_spec(match["package"])
    if spec is None or not spec.submodule_search_locations:
        raise UnavailableError(
            f"{text}: the Python package {match['package']} is not installed",
            hint=f"pip install {match['package'].replace('_', '-')}",
        )
    return Path(next(iter(spec.submodule_search_locations))) / (match["folder"] or "")


def _data(path: str, role: str, recipe_path: Path, known: StatCache) -> Source:
    """A data file on this machine."""
    file = recipe_path.parent / Path(path).expanduser()
    stored = TEXT.get(file.suffix.lower())
    if stored is None:
        kinds = ", ".join(sorted(TEXT))
        raise RecipeError(f"{path}: the {role} file has the suffix {file.suffix!r}", hint=f"known are {kinds}")
    size = check_file(file, path)
    if size == 0:
        raise RecipeError(f"{path}: the {role} file is empty", hint="give text, or JSONL with `text` or `messages`")
    digest = _digest(file, path, known)
    return Source(
        uri=_uri(path), files=(SourceFile(path=stored, size=size, digest=digest),), location=str(file.resolve())
    )


def _digest(path: Path, label: str, known: StatCache) -> str:
    try:
        return known.sha256(path)
    except OSError as error:
        raise _unreadable(label, error) from None


def _unreadable(label: str, error: OSError) -> RecipeError:
    return RecipeError(f"{label}: {error.strerror}", hint="check the file and its permissions")


def _uri(text: str) -> str:
    """A path as a manifest may name it: without this machine's folders in it."""
    path = Path(text)
    return path.name if path.is_absolute() or text.startswith("~") else text.rstrip("/").removeprefix("./")


def _hub(text: str, code: bool, cache: Path, offline: bool) -> tuple[Source, dict[str, Any]]:
    """Ask the hub for the commit and the files of a model."""
    match = HUB.fullmatch(text)
    if not match:
        raise RecipeError(f"model.source cannot be {text!r}", hint="write `hf://org/name` or `hf://org/name@revision`")
    if offline:
        raise NetworkError(
            f"{text} is not pinned yet, and --offline forbids to ask the hub", hint="run once without --offline"
        )
    from pipeline.hub.download import download
    from pipeline.hub.listing import listing

    repo = match["repo"]
    commit, remote = listing(repo, match["revision"])
    by_name = {file.path: file for file in remote}
    digests: dict[str, str] = {}

    def read(name: str) -> bytes:
        """A small file. It is kept under git's name for it, and under its digest, where the fetch stage looks."""
        file = by_name[name]
        place = fetch.kept_at(cache, file.sha256 or f"blob-{file.blob}")
        digests[name] = download(repo, commit, file, place)
        data, kept = place.read_bytes(), fetch.kept_at(cache, digests[name])
        if not kept.exists():
            scratch = kept.with_name(f".{kept.name}.{os.getpid()}")
            scratch.write_bytes(data)
            scratch.replace(kept)
        return data

    names, config = files_of_model(by_name, read, f"hf://{repo}", code=code)
    for name in names:
        if by_name[name].sha256:
            digests[name] = f"sha256:{by_name[name].sha256}"
        else:  # the hub announces only git's digest: learn the other by reading the file
            read(name)
    files = tuple(SourceFile(path=name, size=by_name[name].size, digest=digests[name]) for name in names)
    return Source(uri=f"hf://{repo}", revision=commit, files=files), config


def _hub_again(entry: lock.Entry, cache: Path, offline: bool) -> tuple[Source, dict[str, Any]]:
    """A model as the lock has it; the hub is asked only for a config.json that is not in the cache."""
    repo = entry.source.removeprefix("hf://").partition("@")[0]
    source = Source(uri=f"hf://{repo}", revision=entry.revision, files=entry.files)
    (config,) = (file for file in source.files if file.path == "config.json")

    def read(name: str) -> bytes:
        with contextlib.suppress(FileNotFoundError):
            return fetch.kept_at(cache, config.digest).read_bytes()
        if offline:
            raise NetworkError(
                f"config.json of {entry.source} was never downloaded, and --offline forbids it",
                hint="run once without --offline",
            )
        from pipeline.hub.download import download
        from pipeline.hub.listing import RemoteFile

        remote = RemoteFile(config.path, config.size, fetch.hex_of(config.digest))
        download(repo, entry.revision or "", remote, fetch.kept_at(cache, config.digest))
        return fetch.kept_at(cache, config.digest).read_bytes()

    return source, read_json(read, "config.json", f"hf://{repo}")
