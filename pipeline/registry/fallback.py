"""Referrers where the registry keeps no list of them: the tag schema of the OCI distribution spec.

The list of what refers to `sha256:<hex>` is an index under the tag `sha256-<hex>`. Each referrer has a tag of its own,
too, because garbage collectors delete manifests without one.
"""

from __future__ import annotations

from pipeline.digest import canonical
from pipeline.registry import media
from pipeline.registry.media import Descriptor


def referrers_tag(digest: str) -> str:
    """Where the list is."""
    return digest.replace(":", "-")


def keep_tag(subject: str, digest: str) -> str:
    """What keeps a referrer from being collected."""
    return f"{referrers_tag(subject)}.{digest.partition(':')[2][:12]}"


def is_internal(tag: str) -> bool:
    """Whether a tag is one of these."""
    name, _, _ = tag.partition(".")
    return name.startswith("sha256-") and len(name) == 71


def with_referrer(before: bytes, entry: Descriptor, subject: str) -> bytes:
    """The list with one more entry; the same bytes when it is there already. `before` may be empty."""
    listed = []
    if before:
        value = media.document(before, f"the referrers of {subject}")
        listed = list(value.get("manifests", ()))
        if any(isinstance(each, dict) and each.get("digest") == entry.digest for each in listed):
            return before
    listed.append(entry.plain())
    # Sorted, so that the order in which attestations came does not change the digest.
    listed.sort(key=lambda each: str(each.get("digest") if isinstance(each, dict) else ""))
    return canonical({"schemaVersion": 2, "mediaType": media.INDEX, "manifests": listed})
