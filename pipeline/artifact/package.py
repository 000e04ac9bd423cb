"""Assemble an artifact: link the engine's files, write the manifest, and swap the whole folder into place."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifact import attest, card, paths, swap
from pipeline.artifact.attest import Attestation
from pipeline.artifact.clean import check_clean
from pipeline.artifact.manifest import File, Manifest, ManifestFacts, artifact_id, freeze, manifest_bytes
from pipeline.artifact.place import Link, place, write
from pipeline.artifact.read import decode
from pipeline.artifact.roles import ROLES, role_of
from pipeline.digest import canonical, sha256_file
from pipeline.errors import StageError
from pipeline.frozen import frozen

Payload = Mapping[str, Path | bytes]
"""Path in the artifact -> the file that it is, or the bytes of a generated one."""


@frozen
class Assembled:
    """An artifact in its place. `changed` is False when it was there already, whole, and nothing was written."""

    artifact_id: str
    path: Path
    changed: bool


def assemble(
    engine_dir: Path,
    *,
    golden_dir: Path | None,
    manifest_facts: ManifestFacts,
    destination: Path,
    link: Link = "auto",
    license_file: Path | None = None,
    attestations: Mapping[str, Attestation] | None = None,
) -> Assembled:
    """Make `destination` the artifact of an engine; what is there stays untouched until the new one is whole.

    The artifact holds every file of `engine_dir`, those of `golden_dir` under `golden/`, README.md and LICENSE
    (generated, unless the engine brings its own; `license_file` is the text to use), and manifest.json. `link` "auto"
    reflinks or hard-links and copies where that cannot be; linked files of the store become read-only. `attestations`
    (name -> predicate) are written to `.attest/`; of an artifact that is there already, only those that say more than
    the present ones.

    Raises StageError for files that no artifact may hold, for a `destination` that is something else, and when the disk
    refuses; RecipeError when the manifest would tell of this machine.
    """
    given, destination = destination, destination.resolve()  # a link to a larger disk stays; `.` has a name
    payload = _payload(engine_dir, golden_dir, manifest_facts, license_file)
    statements = attestations or {}
    try:
        present = None if swap.left_over(destination) else _present(destination, payload, manifest_facts)
        if present is None:
            destination.parent.mkdir(parents=True, exist_ok=True)
            with swap.locked(destination):
                swap.recover(destination)
                present = _present(destination, payload, manifest_facts)
                if present is None:
                    check_replaceable(destination)
                    data = _manifest(payload, manifest_facts)
                    _write(payload, data, destination, link, statements, manifest_facts.name)
                    return Assembled(artifact_id(data), given, True)
        _renew(destination, present, statements, manifest_facts.name)
    except OSError as error:
        raise disk_error(error, payload, destination) from error
    return Assembled(present, given, False)


def _payload(engine: Path, golden: Path | None, facts: ManifestFacts, license_file: Path | None) -> Payload:
    """Every file of the artifact but manifest.json, sorted by path."""
    files: dict[str, Path | bytes] = dict(regular_files(engine))
    for name in files:
        if paths.folded(name.partition("/")[0]) in (paths.ATTESTATIONS, paths.MANIFEST, paths.GOLDEN):
            raise StageError(
                f"{engine / name}: '{name}' is a name that the artifact itself uses",
                hint="the target's engine step must not write it",
            )
    if golden:
        files |= {f"{paths.GOLDEN}/{name}": path for name, path in regular_files(golden).items()}
    present = {paths.folded(name) for name in files}
    if "license" not in present and (text := license_file or card.license_text(facts)):
        files["LICENSE"] = text
    if "readme.md" not in present:
        files["README.md"] = card.readme(facts, license_there="license" in {paths.folded(name) for name in files})
    return dict(sorted(files.items()))


def regular_files(folder: Path) -> dict[str, Path]:
    """Relative path -> regular file, of all below a folder. StageError for links and special files."""
    found, waiting = {}, [(folder, "")]
    while waiting:
        directory, prefix = waiting.pop()
        for entry in os.scandir(directory):
            if entry.is_dir(follow_symlinks=False):
                waiting.append((Path(entry.path), f"{prefix}{entry.name}/"))
            elif entry.is_file(follow_symlinks=False):
                found[prefix + entry.name] = Path(entry.path)
            else:
                raise StageError(f"{entry.path} is not a regular file", hint="an artifact holds no links or devices")
    return found


def _manifest(payload: Payload, facts: ManifestFacts) -> bytes:
    """The bytes of manifest.json; every file is read to its end."""
    import hashlib

    files = []
    for path, content in payload.items():
        if isinstance(content, bytes):
            size, digest = len(content), f"sha256:{hashlib.sha256(content).hexdigest()}"
        else:
            size, digest = content.stat().st_size, sha256_file(content)
        role = role_of(path)
        files.append(File(path=path, size=size, digest=digest, media_type=ROLES[role], role=role))
    try:
        data = manifest_bytes(Manifest(**vars(facts), files=tuple(files)))
    except (TypeError, ValueError) as error:
        raise StageError(f"the manifest cannot be written: {error}") from error
    _, problems = decode(data)
    if problems:
        raise StageError(
            "the manifest would not be valid:" + "".join(f"\n  {problem}" for problem in problems),
            hint="this is a fault of the target that built the engine: report it",
        )
    check_clean(json.loads(data))
    return data


def _present(destination: Path, payload: Payload, facts: ManifestFacts) -> str | None:
    """The id of the artifact at `destination` if it is this one and whole, else None. Reads as little as it can."""
    try:
        path = destination / paths.MANIFEST
        data, written = path.read_bytes(), path.lstat()
        found = json.loads(data)
        if canonical(found) != data:
            return None
        listed = {file["path"]: file for file in found["files"]}
        said = {name: value for name, value in found.items() if name not in ("files", "schema")}
        if not stat.S_ISREG(written.st_mode) or said != freeze(facts) or listed.keys() != payload.keys():
            return None
        there = _files_present(destination)
        if there.keys() != listed.keys():
            return None
        since = written.st_mtime_ns if _statements(destination, artifact_id(data)) else 0
        whole = all(_same(payload[name], there[name], listed[name], since) for name in listed)
    except (OSError, StageError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return artifact_id(data) if whole else None


def _files_present(destination: Path) -> dict[str, Path]:
    """The artifact's files, without manifest.json and `.attest/`."""
    hidden = f"{paths.ATTESTATIONS}/"
    files = regular_files(destination)
    return {name: path for name, path in files.items() if name != paths.MANIFEST and not name.startswith(hidden)}


def _same(content: Path | bytes, there: Path, listed: Mapping[str, Any], since: int) -> bool:
    """Whether the file `there` still has the digest that the manifest lists, and is made of `content`.

    A link to the source (which the store has just looked at), or a copy with its size and mtime, is trusted if it was
    last written before `since`: when the manifest was written, in ns, if an attestation vouches for the manifest, else
    0. A copy must not have been touched in any way since then. Any other file is hashed.
    """
    if isinstance(content, bytes):
        return there.read_bytes() == content
    source, copy = content.stat(), there.lstat()
    if source.st_size != listed["size"] or copy.st_size != listed["size"]:
        return False
    linked = (source.st_dev, source.st_ino) == (copy.st_dev, copy.st_ino)
    untouched = source.st_mtime_ns == copy.st_mtime_ns and copy.st_ctime_ns < since
    if (linked or untouched) and copy.st_mtime_ns < since:
        return True
    return sha256_file(there) == listed["digest"] and (linked or sha256_file(content) == listed["digest"])


def check_replaceable(destination: Path) -> None:
    """Refuse to replace what is not an artifact: somebody's folder is not ours to delete."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise StageError(f"{destination} is not a folder", hint="move it away, or choose another --out")
    manifest = destination / paths.MANIFEST
    ours = (destination / paths.ATTESTATIONS).is_dir() or not any(destination.iterdir())
    if manifest.is_file():
        data = manifest.read_bytes()
        ours = ours or data.startswith(b'{"build_key":') or b"urn:enginewright:artifact:" in data
    if not ours:
        raise StageError(
            f"{destination} is not empty and is not an artifact", hint="move it away, or choose another --out"
        )


def _write(
    payload: Payload,
    manifest: bytes,
    destination: Path,
    link: Link,
    statements: Mapping[str, Attestation],
    name: str,
) -> None:
    """Put the folder together beside its destination, then swap it in."""
    identity = artifact_id(manifest)
    with swap.replacing(destination) as new:
        for path, content in payload.items():
            if isinstance(content, bytes):
                write(content, new / path)
            else:
                place(content, new / path, link)
        write(manifest, new / paths.MANIFEST)
        # The same artifact again, which was damaged: what was said of it still holds.
        for key, found in _statements(destination, identity).items():
            if key not in statements or (attest.judged(found["predicate"]) and not attest.judged(statements[key][1])):
                attest.write_attestation(new, key, found)
        _renew(new, identity, statements, name)


def _statements(artifact: Path, identity: str) -> dict[str, dict[str, Any]]:
    """Name -> statement, of those in `.attest/` that speak of the artifact with this id."""
    found, folder = {}, artifact / paths.ATTESTATIONS
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        data = path.read_bytes()
        if attest.statement_problem(data, identity) is None:
            found[path.stem] = json.loads(data)
    return found


def _renew(artifact: Path, identity: str, statements: Mapping[str, Attestation], name: str) -> None:
    """Write the attestations that are not there, and verdicts where there is none yet."""
    present = _statements(artifact, identity)
    for key, new in statements.items():
        old = present.get(key)
        if old is None or (attest.judged(new.predicate) and not attest.judged(old["predicate"])):
            attest.write_attestation(
                artifact, key, attest.statement(new.predicate_type, identity, new.predicate, name=name)
            )


def disk_error(error: OSError, payload: Payload, destination: Path) -> StageError:
    """The error for files that could not be put in their place."""
    where = error.filename or destination
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need = sum(len(item) if isinstance(item, bytes) else item.stat().st_size for item in payload.values())
        return StageError(
            f"no space left at {destination}: the artifact needs up to {need / 1e6:.1f} MB there",
            hint="free some space, or choose another --out (on the file system of the store, files are linked)",
        )
    return StageError(
        f"the artifact cannot be written: {where}: {error.strerror}",
        hint="the earlier artifact, if there was one, is untouched; make the folder writable, or choose another --out",
    )
