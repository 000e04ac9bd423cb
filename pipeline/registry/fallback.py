"""Referrers where the registry keeps no list of them: the tag schema of the OCI distribution spec.

The list of what refers to `sha256:<hex>` is an index under the tag `sha256-<hex>`. Each referrer has a tag of its own,
too, because garbage collectors delete manifests without one.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def listed_as(data: bytes) -> Descriptor:
    """How a list of referrers names an attestation's manifest."""
    value = media.document(data, "the attestation's manifest")
    return media.described(
        media.MANIFEST, data, annotations=value.get("annotations", {}), artifact_type=str(value.get("artifactType", ""))
    )


def with_referrers(before: bytes, entries: Sequence[Descriptor], subject: str) -> bytes:
    """The list with more entries; the same bytes when they are there already. `before` may be empty."""
    listed = list(media.document(before, f"the referrers of {subject}").get("manifests", ())) if before else []
    present = {each.get("digest") for each in listed if isinstance(each, dict)}
    new = [entry.plain() for entry in entries if entry.digest not in present]
    if before and not new:
        return before
    # Sorted, so that the order in which attestations came does not change the digest.
    listed = sorted(listed + new, key=lambda each: str(each.get("digest") if isinstance(each, dict) else ""))
    return canonical({"schemaVersion": 2, "mediaType": media.INDEX, "manifests": listed})
