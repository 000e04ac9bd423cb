"""What a shared store says of one result: a small JSON document, written last, and read with suspicion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.artifact.paths import clashes, digest_problem, path_problem, size_problem
from pipeline.digest import sha256_of
from pipeline.errors import VerificationError
from pipeline.store import Entry

FORMAT = 1
MAX_BYTES = 16 << 20
"""A record may list this much; no result comes near."""


@dataclass(frozen=True)
class File:
    """One file of a result. Its bytes are a blob named by the digest."""

    path: str
    """Relative to the stage's own directory, with `/`."""
    size: int
    """Bytes."""
    digest: str


@dataclass(frozen=True)
class Record:
    """A result: the text that its key is the digest of, its files, and what the run cost where it was made."""

    key: str
    key_text: Mapping[str, Any]
    files: tuple[File, ...]
    run: Mapping[str, Any]

    @classmethod
    def of(cls, entry: Entry, key_text: Mapping[str, Any]) -> Record:
        """The record of a result of the local store."""
        files = tuple(File(file["path"], file["size"], file["digest"]) for file in entry.files)
        return cls(entry.key, key_text, files, entry.run)

    @classmethod
    def read(cls, key: str, data: bytes) -> Record:
        """A record from bytes that came from outside. VerificationError for one that cannot be what `key` names."""
        try:
            value = json.loads(data)
            text, run = value["key_text"], value["run"]
            files = tuple(File(str(f["path"]), int(f["size"]), str(f["digest"])) for f in value["files"])
            known = value["format"] == FORMAT and isinstance(run, dict)
            named = f"{text['stage']}-{sha256_of(text).removeprefix('sha256:')}"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise VerificationError(f"the record is unreadable ({type(error).__name__}: {error})") from error
        if not known:
            raise VerificationError(f"the record is of another format than {FORMAT}")
        if named != key:
            raise VerificationError(f"the record is that of {named}")
        for file in files:
            if problem := path_problem(file.path) or digest_problem(file.digest) or size_problem(file.size):
                raise VerificationError(f"the record lists {file.path!r:.200}, which {problem}")
        if problems := clashes(file.path for file in files):
            raise VerificationError(f"the record lists what cannot be: {problems[0]}")
        return cls(key, text, files, run)

    def data(self) -> bytes:
        """As bytes."""
        value = {
            "format": FORMAT,
            "key_text": self.key_text,
            "files": [{"path": file.path, "size": file.size, "digest": file.digest} for file in self.files],
            "run": self.run,
        }
        return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()

    @property
    def size_bytes(self) -> int:
        """Sum of the files' sizes."""
        return sum(file.size for file in self.files)
