"""Replace a folder by another in one step, so that at every moment a whole one is there.

Beside the artifact `x` may lie `.x.assembling` (not finished, or an old one not yet deleted: rubbish) and `.x.previous`
(moved aside on a system that cannot exchange two names: put back if `x` is missing). `recover` tidies both.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline.artifact.place import remove, sync, sync_names

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def assembling(destination: Path) -> Path:
    """Where the next artifact is put together: on the same file system, out of sight."""
    return destination.with_name(f".{destination.name}.assembling")


def previous(destination: Path) -> Path:
    """Where the old artifact is for the moment between two renames."""
    return destination.with_name(f".{destination.name}.previous")


@contextlib.contextmanager
def locked(destination: Path) -> Iterator[None]:
    """Hold the lock of an artifact's place. The kernel drops it when a holder dies; the empty file stays."""
    with destination.with_name(f".{destination.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def recover(destination: Path) -> None:
    """Tidy what a killed builder left; an artifact that was moved aside comes back. The caller holds the lock."""
    if previous(destination).exists() and not destination.exists():
        previous(destination).rename(destination)
    remove(previous(destination))
    remove(assembling(destination))


@contextlib.contextmanager
def replacing(destination: Path) -> Iterator[Path]:
    """A new folder that takes the place of `destination` when the block ends well, and is removed when not.

    The caller holds the lock.
    """
    new = assembling(destination)
    try:
        new.mkdir()
        yield new
        sync(new)
        publish(destination)
    except BaseException:
        recover(destination)
        raise


def left_over(destination: Path) -> bool:
    """Whether `recover` has something to do."""
    return assembling(destination).exists() or previous(destination).exists()


def publish(destination: Path) -> None:
    """Put the folder that was assembled in the place of `destination`, and delete the old one."""
    new, old = assembling(destination), previous(destination)
    if not destination.exists():
        new.rename(destination)
    elif _exchange(new, destination):
        sync_names(destination.parent)
        remove(new)
    else:
        destination.rename(old)
        try:
            new.rename(destination)
        except OSError:
            old.rename(destination)
            raise
        sync_names(destination.parent)
        remove(old)
    sync_names(destination.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    import ctypes  # here: most builds change nothing and need it not

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
