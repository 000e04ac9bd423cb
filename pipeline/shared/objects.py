"""A bucket, or whatever else fsspec opens: `s3://bucket/prefix`, `gs://bucket/prefix`.

Credentials and endpoints come from the environment, as each library documents: `AWS_*`,
`GOOGLE_APPLICATION_CREDENTIALS`; `FSSPEC_S3_ANON=true` reads a public bucket without any. An object is there whole or
not at all: that is what object stores promise of a finished upload.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import NetworkError, RecipeError, UnavailableError
from pipeline.registry.crew import together
from pipeline.shared.denied import DeniedError
from pipeline.shared.layout import blob_name, record_name
from pipeline.shared.record import MAX_BYTES, File

WORKERS = 4
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocol -> the extra that installs its library."""


class Objects:
    """Results as objects below a prefix."""

    def __init__(self, url: str) -> None:
        protocol = urlsplit(url).scheme
        import fsspec  # type: ignore[import-untyped]

        try:
            # No listing and no instance is kept: what others write in the meantime must be seen.
            self._files: Any = fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)
        except ValueError as error:
            raise RecipeError(
                f"--shared: {protocol}:// is no place for a shared store",
                hint="give s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, file:///FOLDER or oci://HOST/REPOSITORY",
            ) from error
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            raise UnavailableError(
                f"--shared: {protocol}:// needs a library that is not here ({error})",
                hint=f"pip install 'enginewright[{extra}]'"
                if extra
                else "install the fsspec implementation that it names",
            ) from error
        self.name = url
        self._root = url.rstrip("/")

    def record(self, key: str) -> bytes | None:
        name = f"{self._root}/{record_name(key)}"
        with self._explained():
            try:
                data: bytes = self._files.cat_file(name, start=0, end=MAX_BYTES)
            except FileNotFoundError:
                return None
            except PermissionError:
                raise
            except Exception:
                if self._size(name) != 0:  # of an empty object no part can be asked for
                    raise
                return b""
            return data
        return None

    def fetch(self, blob: File, path: Path) -> bool:
        name = f"{self._root}/{blob_name(blob.digest)}"
        with self._explained():
            try:
                if self._files.info(name)["size"] == blob.size:  # else: the reader sees that it is something else
                    self._files.get_file(name, str(path))
                else:
                    path.touch()
            except FileNotFoundError:
                return False
        return True

    def put(
        self, key: str, record: bytes, blobs: Sequence[tuple[File, Path]], *, damaged: frozenset[str], replace: bool
    ) -> None:
        def send(each: tuple[File, Path], _: Any) -> None:
            blob, path = each
            name = f"{self._root}/{blob_name(blob.digest)}"
            if blob.digest in damaged or self._size(name) != blob.size:
                self._files.put_file(str(path), name)

        with self._explained():
            together(send, blobs, lambda size: None, WORKERS)
            # Refused by the bucket itself when another writer was first: a condition of the request.
            with contextlib.suppress(FileExistsError):
                mode = "overwrite" if replace else "create"
                self._files.pipe_file(f"{self._root}/{record_name(key)}", record, mode=mode)

    def _size(self, name: str) -> int:
        try:
            return int(self._files.info(name)["size"])
        except FileNotFoundError:
            return -1

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """These libraries raise what the service's own library raises: any of it means that the place failed."""
        try:
            yield
        except PermissionError as error:
            raise DeniedError(f"{self.name}: {error}") from error
        except Exception as error:
            raise NetworkError(f"{self.name}: {type(error).__name__}: {error}") from error
