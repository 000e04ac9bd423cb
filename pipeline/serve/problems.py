"""What a client is told when a request cannot be answered: an HTTP status and OpenAI's form of an error."""

from __future__ import annotations

from typing import Any


class Problem(Exception):  # noqa: N818  an answer, not a failure of ours
    """An answer other than 200."""

    status = 500
    kind = "server_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param = message, param

    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": None}
        return {"error": told}


class BadRequest(Problem):
    """What is asked for has no meaning, or the runtime cannot do it."""

    status, kind = 400, "invalid_request_error"


class Unauthorized(Problem):
    status, kind = 401, "authentication_error"


class NotFound(Problem):
    status, kind = 404, "not_found_error"


class TooLate(Problem):
    """The request's body did not come in time."""

    status, kind = 408, "timeout_error"


class TooLarge(Problem):
    status, kind = 413, "invalid_request_error"


class Busy(Problem):
    """The queue is full; `Retry-After` says when to come again."""

    status, kind = 429, "rate_limit_error"


class Draining(Problem):
    """The server ends: it answers what it has begun, and takes nothing new."""

    status, kind = 503, "server_error"


class TimedOut(Problem):
    """The answer took longer than the server allows."""

    status, kind = 504, "timeout_error"
