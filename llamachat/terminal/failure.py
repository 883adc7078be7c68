"""What went wrong, and what the user should know: short lines on stderr."""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass

from llamachat.errors import LlamachatError


@dataclass(frozen=True, slots=True)
class Notices:
    """Says one line at a time, unless quiet."""

    quiet: bool = False

    def __call__(self, message: str) -> None:
        """Say it."""
        if not self.quiet:
            say(f"llamachat: {message}")


def say(line: str) -> None:
    """One line on stderr, whatever its characters; a closed stderr is no failure."""
    if sys.stderr is None:
        return
    try:
        encoding = sys.stderr.encoding or "utf-8"
        print(line.encode(encoding, "replace").decode(encoding), file=sys.stderr, flush=True)  # noqa: T201
    except (OSError, ValueError):
        pass


def show_failure(error: Exception, *, verbose: bool = False) -> None:
    """One message and one hint; the traceback only if asked for."""
    if verbose:
        say("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, LlamachatError):
        say(f"llamachat: {printable(error.message)}")
        if error.hint:
            say(f"  hint: {printable(error.hint)}")
    else:
        say(f"llamachat: unexpected {type(error).__name__}: {printable(str(error))}")
        if not verbose:
            say("  hint: -v shows where; please report it with the output of `llamachat doctor`")


def printable(text: str) -> str:
    """The text on one line, control characters (a hostile file's escapes) spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
