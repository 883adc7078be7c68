"""Every failure that a user, a file, a network or a device can cause, and its exit code."""

from __future__ import annotations

from typing import ClassVar


class LlamachatError(Exception):
    """A failure with one short message, one hint (what to do next) and an exit code."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(LlamachatError):
    """The command line or an option is wrong, or there is nothing to answer."""

    exit_code = 2


class ModelNotFoundError(LlamachatError):
    """No such model, or it is not on disk and may not be fetched."""

    exit_code = 3


class AccessError(LlamachatError):
    """The model exists, but this user may not have it (gated, bad token)."""

    exit_code = 4


class WillNotFitError(LlamachatError):
    """Not enough memory for the model or its context."""

    exit_code = 5


class PromptTooLongError(LlamachatError):
    """The prompt alone is longer than the context."""

    exit_code = 6


class TransferError(LlamachatError):
    """The network or the disk failed."""

    exit_code = 7


class CheckFailedError(LlamachatError):
    """A check that was asked for did not hold."""

    exit_code = 8


class DamagedFileError(LlamachatError):
    """A file is damaged, hostile, or of a kind that is not supported."""

    exit_code = 9
