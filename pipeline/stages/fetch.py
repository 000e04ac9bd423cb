"""Stage `fetch`: a pinned model or data file as a directory, every byte verified."""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import hashlib
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from pipeline.digest import StatCache
from pipeline.errors import NetworkError, RecipeError, StageError, disk_full
from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.source import SourceFile
from pipeline.step import Inputs, Progress, Stage

LINK_FROM = 4 << 20
"""Bytes from which a file on the same file system is shared instead of copied."""
KEEP_TO = 16 << 20
"""Bytes up to which a download is kept beside the store: planning reads configurations there."""
BLOCK = 4 << 20
WORKERS = 4
"""Downloads side by side: one connection seldom fills a line."""
FICLONE = 0x40049409
"""Linux: let a file share another's blocks until one of them is written."""

AGAIN = "run the build again: it plans with the files as they are"

Advance = Callable[[int], None]


@frozen(kw_only=True)
class FetchOptions:
    """What is fetched, which makes the key, and from where, which does not."""

    files: tuple[SourceFile, ...] = option(doc="The files, by name and contents.")
    uri: str = option(doc="What errors call the source: `hf://org/name`, or a path.", key=False)
    revision: str | None = option(None, "The commit on the hub.", key=False)
    location: str | None = option(None, "The folder or the data file on this machine; none for the hub.", key=False)
    cache: str | None = option(None, "Where downloads and known digests are kept; none keeps nothing.", key=False)
    offline: bool = option(False, "Use what was downloaded before, and no network.", key=False)


def run(inputs: Inputs, options: FetchOptions, out: Path, progress: Progress) -> None:
    """Fill `out` with `options.files`.

    Files on this machine are copied, or shared from 4 MiB on (reflink, else hard link), never symlinked; files on the
    hub are downloaded. Raises StageError for a file that changed since it was pinned or a full disk, RecipeError for
    data that is not UTF-8, NetworkError and VerificationError for the hub.
    """
    advance = _Counter(sum(file.size for file in options.files), progress)
    if options.location is None:
        _download_all(options, out, advance)
        return
    location, known = Path(options.location), StatCache(Path(options.cache)) if options.cache else None
    for file in options.files:
        advance.note = file.path
        _take(
            location / file.path if location.is_dir() else location, file, out / file.path, options.uri, known, advance
        )


STAGE = Stage("fetch", run)


class _StoppedError(Exception):
    """Another thread has failed, and says why."""


class _Counter:
    """Adds up bytes of several threads for one progress; raises _StoppedError in the others when one has failed."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.total, self.progress, self.note = total, progress, ""
        self.done = self.told = 0
        self.stopped = False
        self.guard = threading.Lock()

    def __call__(self, size: int) -> None:
        if self.stopped:
            raise _StoppedError
        with self.guard:
            self.done += size
            if abs(self.done - self.told) >= BLOCK or self.done == self.total:
                self.told = self.done
                self.progress(self.done, self.total, self.note)


def _take(source: Path, file: SourceFile, place: Path, uri: str, known: StatCache | None, advance: Advance) -> None:
    """Put a local file in its place, verified."""
    place.parent.mkdir(parents=True, exist_ok=True)
    text = file.path in ("data.txt", "data.jsonl")
    label = uri if text else f"{uri}/{file.path}"
    try:
        real = source.resolve(strict=True)
        if (size := real.stat().st_size) != file.size:
            raise _changed(label, f"it has {size:,} bytes, it had {file.size:,}")
        trusted = known is not None and known.get(real, strict=True) == file.digest
        shared = size >= LINK_FROM and not text and _share(real, place)
        if known is not None and shared and trusted:
            known.sha256(real)  # a link moved the file's ctime: remember it as it is now
            advance(size)
            return
        digest = _pour(place, None, advance) if shared else _pour(real, place, advance, label if text else "")
    except FileNotFoundError:
        raise StageError(f"{label} is gone since the build was planned", hint=AGAIN) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(place, file.size) from error
        raise StageError(f"{label}: {error.strerror}") from error
    if digest != file.digest:
        if known is not None:
            known.forget(real)
        place.unlink()
        raise _changed(label, f"expected {file.digest}, got {digest}")


def _changed(label: str, how: str) -> StageError:
    return StageError(f"{label} changed since the build was planned: {how}", hint=AGAIN)


def _share(source: Path, place: Path) -> bool:
    """Give `source` a second name at `place` without copying: its blocks, or else the file itself."""
    try:
        with source.open("rb") as old, place.open("xb") as new:
            fcntl.ioctl(new, FICLONE, old.fileno())
        return True
    except OSError:
        place.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another file system, or one that has no links
        place.hardlink_to(source)
        return True
    return False


def _pour(source: Path, place: Path | None, advance: Advance, text: str = "") -> str:
    """Copy (None: only read) and return the digest. `text` names a file that must be UTF-8."""
    digest = hashlib.sha256()
    decoder, lines = codecs.getincrementaldecoder("utf-8")(), 1
    with source.open("rb", buffering=0) as old, place.open("xb") if place else contextlib.nullcontext() as new:
        while True:
            block = old.read(BLOCK)
            if text:
                try:
                    decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    line = lines + error.object.count(b"\n", 0, error.start)
                    what = f"not UTF-8 text (byte 0x{error.object[error.start]:02x})"
                    raise RecipeError(f"{text}:{line}: {what}", hint="save the file as UTF-8") from None
                lines += block.count(b"\n")
            if not block:
                return "sha256:" + digest.hexdigest()
            digest.update(block)
            if new is not None:
                new.write(block)
            advance(len(block))


def _download_all(options: FetchOptions, out: Path, advance: _Counter) -> None:
    """Download what is not in the cache, several files at a time, and put all of it in its place."""
    cache = Path(options.cache) if options.cache else out / ".partial"
    advance.note = options.uri
    need = sum(max(0, file.size - _present(kept_at(cache, file.digest))) for file in options.files)
    if need > shutil.disk_usage(out).free:
        raise disk_full(out, need)
    from concurrent.futures import ThreadPoolExecutor, as_completed

    pool = ThreadPoolExecutor(WORKERS)
    try:
        for done in as_completed([pool.submit(_bring, file, options, cache, out, advance) for file in options.files]):
            done.result()
    except BaseException:
        advance.stopped = True
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        if not options.cache:
            shutil.rmtree(cache, ignore_errors=True)


def _bring(file: SourceFile, options: FetchOptions, cache: Path, out: Path, advance: _Counter) -> None:
    """One file from the cache, from the library's own cache or from the hub."""
    from pipeline.hub.client import cached
    from pipeline.hub.download import download
    from pipeline.hub.listing import RemoteFile

    place, kept, commit = out / file.path, kept_at(cache, file.digest), options.revision or ""
    repo = options.uri.removeprefix("hf://")
    if not kept.exists():
        if (found := cached(repo, commit, file.path)) is not None:
            with contextlib.suppress(StageError):  # a damaged one is downloaded
                _take(found, file, place, options.uri, None, advance)
                return
        if options.offline:
            raise NetworkError(
                f"{file.path} of {options.uri} was never downloaded, and --offline forbids it",
                hint="run the command once without --offline",
            )
    download(repo, commit, RemoteFile(file.path, file.size, sha256=hex_of(file.digest)), kept, advance)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        if file.size > KEEP_TO and kept.stat().st_dev == out.stat().st_dev:
            kept.replace(place)
        else:
            shutil.copyfile(kept, place)
            if file.size > KEEP_TO:
                kept.unlink()
    except FileNotFoundError:  # another build has just taken it
        _bring(file, options, cache, out, advance)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(place, file.size) from error
        raise


def kept_at(cache: Path, digest: str) -> Path:
    """Where a download is kept, by its `sha256:<hex>`."""
    return cache / "sources" / hex_of(digest)


def hex_of(digest: str) -> str:
    """The digits of `sha256:<hex>`."""
    return digest.removeprefix("sha256:")


def _present(kept: Path) -> int:
    """How much of a download is there, in bytes."""
    for path in (kept, kept.with_name(kept.name + ".partial")):
        with contextlib.suppress(OSError):
            return path.stat().st_size
    return 0
