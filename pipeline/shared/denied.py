"""The one error of a place that is no failure: a builder that may read and not write, as CI of a fork."""

from __future__ import annotations

from pipeline.errors import NetworkError


class DeniedError(NetworkError):
    """The place is there, and these credentials may not do that."""
