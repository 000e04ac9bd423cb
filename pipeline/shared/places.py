"""From a URL to the place that it names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.errors import RecipeError
from pipeline.registry.reference import parse
from pipeline.shared.folder import Folder
from pipeline.shared.images import Images
from pipeline.shared.objects import Objects
from pipeline.shared.place import Place

HINT = "give s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, file:///FOLDER or oci://HOST/REPOSITORY"


def opened(url: str) -> Place:
    """The place; nothing is asked of it yet. RecipeError for what is none."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise RecipeError(f"--shared: {url!r} is not a URL", hint=HINT)
    if "@" in urlsplit(url).netloc:
        raise RecipeError(
            "--shared: a URL with a password ends up in logs", hint="credentials are read from the environment"
        )
    if scheme == "file":
        path = Path(unquote(urlsplit(url).path))
        if urlsplit(url).netloc or not path.is_absolute():
            raise RecipeError(f"--shared: {url!r} names no folder", hint="write file:///FOLDER, with three slashes")
        return Folder(path)
    if scheme == "oci":
        reference = parse(rest)
        if reference.tag or reference.digest:
            raise RecipeError(
                f"--shared: {url!r} names one version, not a repository", hint=f"write oci://{reference.name}"
            )
        return Images(reference)
    return Objects(url)
