"""What went wrong, and what the user should know: short lines on stderr."""

from __future__ import annotations

import re
import sys
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from llamachat.errors import LlamachatError, TransferError, WillNotFitError
from llamachat.terminal import log
from llamachat.terminal.output import shown, size_of

NARROWEST = 20  # columns that are worth words of their own
# As torch, CUDA and C++ say it.
_OUT_OF_MEMORY = re.compile(
    "out of memory|(not enough|can't allocate|cannot allocate) memory|bad_alloc", re.IGNORECASE
)


def say(text: str, *, verbatim: bool = False) -> None:
    """Lines on stderr, whatever their characters; a closed stderr is no failure.

    Args:
        text: one line, or several.
        verbatim: lines that a terminal is too narrow for are not wrapped at words.
    """
    try:
        encoding = sys.stderr.encoding or "utf-8"
        line = shown(text).encode(encoding, "replace").decode(encoding)
        if not verbatim and sys.stderr.isatty():
            line = wrapped(line, size_of(sys.stderr).columns)
        print(line, file=sys.stderr, flush=True)  # noqa: T201  # where all lines go
    except (OSError, ValueError):
        pass


def wrapped(text: str, columns: int) -> str:
    """Lines, of which those that are too long go on below, indented; no word is cut."""
    return "\n".join(
        line
        if len(line) <= columns or columns < NARROWEST
        else textwrap.fill(
            line,
            columns,
            subsequent_indent=" " * (len(line) - len(line.lstrip()) + 2),
            replace_whitespace=False,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.split("\n")
    )


def understood(error: Exception) -> Exception:
    """The failure in our words, where a device or the system is its cause."""
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        hint = "a smaller --ctx-size, --quantize int4, or a smaller model"
        return WillNotFitError("out of memory", hint=hint)
    if isinstance(error, OSError) and error.strerror and not isinstance(error, BrokenPipeError):
        return TransferError(f"{error.filename or 'the system'}: {error.strerror}")
    return error


@dataclass(frozen=True, slots=True)
class Notices:
    """Says one line at a time, unless quiet.

    Attributes:
        quiet: nothing is said.
        tell: who says it.
    """

    quiet: bool = False
    tell: Callable[[str], None] = say

    def __call__(self, message: str) -> None:
        """Say it."""
        if not self.quiet:
            self.tell(f"llamachat: {one_line(message)}")


def show_failure(error: Exception, *, verbose: bool = False) -> None:
    """One message and one hint; the traceback only if asked for.

    Of what nobody foresaw a log is kept.
    """
    if verbose:
        say("".join(traceback.format_exception(error)).rstrip(), verbatim=True)
    error = understood(error)
    if isinstance(error, LlamachatError):
        say(f"llamachat: {one_line(error.message)}")
        if error.hint:
            say(f"  hint: {one_line(error.hint)}")
        return
    say(f"llamachat: unexpected {type(error).__name__}: {one_line(str(error))}")
    file = log.record(error)
    kept = f"a log was written to {file}; " if file else ""
    say(f"  hint: {kept}-v shows where; please report it with the output of `llamachat doctor`")


def one_line(text: str) -> str:
    """The text on one line, tabs and newlines spelled out."""
    return text.replace("\n", "\\n").replace("\t", "\\t")
