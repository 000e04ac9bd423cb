"""What a revision of a model on the hub holds."""

from __future__ import annotations

from pipeline.frozen import frozen
from pipeline.hub.client import endpoint, library, timeout_s
from pipeline.hub.explain import wait_or_raise


@frozen
class RemoteFile:
    """A file of a commit. The hub announces `sha256` (hex) of LFS files, and `blob`, git's sha1, of the others."""

    path: str
    size: int
    sha256: str | None = None
    blob: str | None = None


def listing(repo: str, revision: str | None) -> tuple[str, list[RemoteFile]]:
    """The commit that a branch, a tag or a commit stands for (None: the default branch), and its files.

    Raises RecipeError for a repository or a revision that is not there, NetworkError for the rest.
    """
    api = library().HfApi(endpoint=endpoint(), library_name="enginewright")
    failures = 0
    while True:
        try:
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=timeout_s())
            return str(info.sha), [
                RemoteFile(f.rfilename, int(f.size), f.lfs and f.lfs.sha256, None if f.lfs else f.blob_id)
                for f in info.siblings
            ]
        except Exception as error:
            failures += 1
            wait_or_raise(error, failures, repo, revision)
