"""Every error a user can see: its exit code, what is wrong, and what to do about it.

Exit codes: 0 ok, 1 a bug, 3 a stage failed, 4 a gate failed, 5 target, toolchain or hardware not available,
6 verification or signature failed, 7 registry or network, 64 recipe or usage wrong.
"""

from __future__ import annotations

from pathlib import Path


class EnginewrightError(Exception):
    """An error with an exit code and a hint: the command line prints both and shows no traceback."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class RecipeError(EnginewrightError):
    """The recipe, a file it names, or the command's usage is wrong."""

    exit_code = 64


class StageError(EnginewrightError):
    """A stage ran and failed."""

    exit_code = 3


class GateError(EnginewrightError):
    """The engine was built and measured, and a gate said no."""

    exit_code = 4


class UnavailableError(EnginewrightError):
    """A target, an extra, a toolchain or the hardware that a step needs is not here."""

    exit_code = 5


class VerificationError(EnginewrightError):
    """An artifact is not what its manifest says."""

    exit_code = 6


class NetworkError(EnginewrightError):
    """A hub or a registry could not be reached, or did not give what was asked."""

    exit_code = 7


BY_EXIT_CODE: dict[int, type[EnginewrightError]] = {
    cls.exit_code: cls
    for cls in (RecipeError, StageError, GateError, UnavailableError, VerificationError, NetworkError)
}


def disk_full(place: Path, need: int) -> StageError:
    """The error for a full disk. `need` is in bytes."""
    import shutil

    free = shutil.disk_usage(place.parent).free
    return StageError(
        f"no space left for {place}: {need:,} bytes needed, {free:,} bytes free",
        hint="free some space (`enginewright cache gc`), or give another place with --cache",
    )
