"""Put a file into an artifact: reflinked or hard-linked from the store where that is safe, else copied; read-only."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from pathlib import Path
from typing import Literal

Link = Literal["auto", "copy"]

_FICLONE = 0x40049409
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}


def place(source: Path, destination: Path, link: Link) -> None:
    """Make `destination` hold the bytes of `source`, with its mtime, read-only and on disk. Raises OSError."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    if link == "auto" and (_reflink(source, destination) or _hardlink(source, destination)):
        return
    shutil.copyfile(source, destination, follow_symlinks=False)
    _finish(source, destination)


def write(data: bytes, destination: Path) -> None:
    """Make `destination` hold `data`, read-only and on disk. Raises OSError."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with destination.open("xb") as stream:
        stream.write(data)
        os.fchmod(stream.fileno(), 0o444)
        stream.flush()
        os.fsync(stream.fileno())


def sync(folder: Path) -> None:
    """Put a folder's names on disk, and those of all folders below it."""
    for path, _, _ in os.walk(folder, topdown=False):
        sync_names(Path(path))


def sync_names(folder: Path) -> None:
    """Put one folder's names on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Delete a folder, its read-only folders too. Missing is fine. Raises OSError."""
    if not folder.exists():
        return
    for path, _, _ in os.walk(folder):
        if not os.access(path, os.W_OK | os.X_OK):
            Path(path).chmod(0o755)
    shutil.rmtree(folder)


def _reflink(source: Path, destination: Path) -> bool:
    """A copy that shares blocks until one side is changed (Btrfs, XFS)."""
    with source.open("rb") as original, destination.open("xb") as clone:
        try:
            fcntl.ioctl(clone.fileno(), _FICLONE, original.fileno())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
        else:
            _finish(source, destination)
            return True
    destination.unlink()
    return False


def _hardlink(source: Path, destination: Path) -> bool:
    found = source.stat()
    if found.st_mode & 0o222:
        if found.st_nlink > 1:
            return False  # writable under another name: somebody's own file, which may change there
        try:
            source.chmod(_mode(found))
        except OSError:
            return False  # not ours
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NO_LINK:
            return False
        raise
    return True


def _finish(source: Path, copy: Path) -> None:
    found = source.stat()
    os.utime(copy, ns=(found.st_atime_ns, found.st_mtime_ns))
    copy.chmod(_mode(found))
    sync_names(copy)


def _mode(found: os.stat_result) -> int:
    return 0o555 if stat.S_IMODE(found.st_mode) & 0o111 else 0o444
