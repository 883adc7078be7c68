"""What went wrong, and what the user should know: short lines on stderr."""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass

from llamachat.errors import LlamachatError
from llamachat.terminal.output import shown


@dataclass(frozen=True, slots=True)
class Notices:
    """Says one line at a time, unless quiet."""

    quiet: bool = False

    def __call__(self, message: str) -> None:
        """Say it."""
        if not self.quiet:
            say(f"llamachat: {one_line(message)}")


def say(text: str) -> None:
    """Lines on stderr, whatever their characters; a closed stderr is no failure."""
    try:
        encoding = sys.stderr.encoding or "utf-8"
        line = shown(text).encode(encoding, "replace").decode(encoding)
        print(line, file=sys.stderr, flush=True)  # noqa: T201  # where all lines go
    except (OSError, ValueError):
        pass


def show_failure(error: Exception, *, verbose: bool = False) -> None:
    """One message and one hint; the traceback only if asked for."""
    if verbose:
        say("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, LlamachatError):
        say(f"llamachat: {one_line(error.message)}")
        if error.hint:
            say(f"  hint: {one_line(error.hint)}")
    else:
        say(f"llamachat: unexpected {type(error).__name__}: {one_line(str(error))}")
        if not verbose:
            say("  hint: -v shows where; please report it with the output of `llamachat doctor`")


def one_line(text: str) -> str:
    """The text on one line, tabs and newlines spelled out."""
    return text.replace("\n", "\\n").replace("\t", "\\t")
