"""The names in a folder or a bucket: `results/<key>.json` and `blobs/sha256/<2 digits>/<64 digits>`."""

from __future__ import annotations


def record_name(key: str) -> str:
    """Where the record of a key is."""
    return f"results/{key}.json"


def blob_name(digest: str) -> str:
    """Where the blob of a digest is."""
    algorithm, _, digits = digest.partition(":")
    return f"blobs/{algorithm}/{digits[:2]}/{digits}"
