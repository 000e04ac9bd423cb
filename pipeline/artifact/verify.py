"""Check an artifact against its manifest: every file, nothing else, all problems at once. Reads only."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from pipeline.artifact import dsse, paths, swap
from pipeline.artifact.attest import statement_problem
from pipeline.artifact.manifest import File, Manifest, artifact_id
from pipeline.artifact.read import decode, manifest_file
from pipeline.errors import RecipeError, VerificationError
from pipeline.frozen import frozen


@frozen
class Report:
    """What was found. `artifact_id` and `manifest` are None when manifest.json itself is not valid."""

    path: Path
    artifact_id: str | None
    manifest: Manifest | None
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    checked: int
    """How many files were read to their end."""

    @property
    def ok(self) -> bool:
        """Whether the artifact is what its manifest says."""
        return not self.problems


def verify(path: Path) -> Report:
    """The report of an artifact that is what its manifest says.

    Raises VerificationError with every problem, RecipeError when there is no such folder.
    """
    report = examine(path)
    require(report)
    return report


def require(report: Report) -> None:
    """Raise VerificationError with every problem of a report that has any."""
    if report.problems:
        count = len(report.problems)
        raise VerificationError(
            f"{report.path} is not what its manifest says ({count} problem{'s' * (count > 1)}):"
            + "".join(f"\n  {problem}" for problem in report.problems[:100])
            + (f"\n  and {count - 100} more" if count > 100 else ""),
            hint="do not use it: build it again, or fetch it again from where it came",
        )


def examine(path: Path) -> Report:
    """Read every file of the artifact at `path` and compare. RecipeError when there is no such folder."""
    try:
        data = manifest_file(path)
    except RecipeError as error:
        if not path.exists() and path.name and swap.previous(path).exists():
            error.hint = f"a build was killed while it replaced it; the earlier one is {swap.previous(path)}"
        raise
    except VerificationError as error:
        return Report(path, None, None, (error.message,), (), 0)
    manifest, problems = decode(data)
    if manifest is None:
        return Report(path, None, None, tuple(f"{paths.MANIFEST}: {problem}" for problem in problems), (), 0)
    identity = artifact_id(data)
    listed = {file.path: file for file in manifest.files}
    by_digest = {file.digest: file.path for file in manifest.files}
    found: set[str] = set()
    warnings: list[str] = []
    checked = 0
    for name, problem, mode in _entries(path):
        found.add(name)
        hidden = name == paths.MANIFEST or name.startswith(f"{paths.ATTESTATIONS}/")
        if problem:
            problems.append(f"{name!r}: {problem}")
        elif name in listed:
            checked += 1
            if wrong := _wrong(path / name, listed[name], by_digest):
                problems.append(f"{name}: {wrong}")
        elif not hidden:
            problems.append(f"{name!r}: is not in the manifest")
        elif name.startswith(f"{paths.ATTESTATIONS}/") and name.endswith((".json", ".dsse")):
            wrong = _wrong_statement(path / name, identity)
            problems += [f"{name!r}: {wrong}"] if wrong else []
        if mode & stat.S_IWOTH and not problem:
            warnings.append(f"{name!r}: anyone on this machine may write it")
    problems += [f"{name}: is missing" for name in listed if name not in found]
    return Report(path, identity, manifest, tuple(problems), tuple(warnings), checked)


def _entries(root: Path) -> Iterator[tuple[str, str, int]]:
    """(path in the artifact, what is wrong with its kind or "", mode) of all but folders, in order of names."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError as error:
            yield folder, f"cannot be listed: {error.strerror}", 0
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                waiting.append(name)
            elif stat.S_ISLNK(found.st_mode):
                yield name, "is a symbolic link, and an artifact holds none", 0
            elif not stat.S_ISREG(found.st_mode):
                yield name, "is not a regular file", 0
            elif found.st_mode & (stat.S_ISUID | stat.S_ISGID):
                yield name, "runs with another user's rights (setuid or setgid)", found.st_mode
            else:
                yield name, "", found.st_mode


def _wrong(path: Path, listed: File, by_digest: dict[str, str]) -> str | None:
    """Why a file is not the listed one. Its size is judged first, then every byte."""
    try:
        with _open(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != listed.size:
                return f"has {size} bytes, and the manifest says {listed.size}"
            digest = f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if digest == listed.digest:
        return None
    if other := by_digest.get(digest):
        return f"holds what the manifest lists as '{other}'"
    return f"has other contents: {digest}, and the manifest says {listed.digest}"


def _wrong_statement(path: Path, identity: str) -> str | None:
    try:
        with _open(path) as stream:
            judge = dsse.problem if path.suffix == ".dsse" else statement_problem
            return judge(stream.read(), identity)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _open(path: Path) -> io.BufferedReader:
    """Open a regular file for reading; a link that was put there since is refused."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
