"""stdout: the model's text or JSON, and nothing else."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Callable

from llamachat.errors import TransferError

# C0 without tab and newline, DEL, C1, line separators, and what reorders a line's characters.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def prepare() -> None:
    """Let text go to files and pipes as the same bytes everywhere; no character is a failure."""
    stdout = sys.stdout
    if not isinstance(stdout, io.TextIOWrapper):
        return
    if stdout.isatty():
        stdout.reconfigure(errors="replace")
    else:
        stdout.reconfigure(encoding="utf-8", errors="replace", newline="\n")


def write(text: str, *, look: Callable[[str], str] = str) -> None:
    """Write text that is read at once; on a terminal, control characters are spelled out.

    Args:
        text: what is written.
        look: adds a terminal's own escapes to what a terminal shows.

    Raises:
        BrokenPipeError: nobody reads on.
        TransferError: it cannot be written.
    """
    try:
        sys.stdout.write(look(shown(text)) if sys.stdout.isatty() else text)
        sys.stdout.flush()
    except OSError as error:
        raise lost(error) from error


def lost(error: OSError) -> Exception:
    """What it means that stdout failed; what is still buffered goes nowhere, quietly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # Windows has no EPIPE for pipes.
    if isinstance(error, BrokenPipeError) or (os.name == "nt" and error.errno == errno.EINVAL):
        return BrokenPipeError()
    return TransferError(f"stdout: {error.strerror or error}", hint="write to another file or disk")


def shown(text: str) -> str:
    """Text for a terminal: nobody's words may move the cursor or set the title."""
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


class Lines:
    """Text in pieces, with exactly one newline at its end."""

    def __init__(self, write: Callable[[str], None] = write) -> None:
        self._write = write
        self._newlines = ""
        self._began = False

    def write(self, piece: str) -> None:
        """Write a piece, except for the newlines at its end, which may be the last."""
        text = self._newlines + piece
        body = text.rstrip("\n")
        self._newlines = text[len(body) :]
        if body:
            self._began = True
            self._write(body)

    def end(self, *, complete: bool) -> None:
        """Write the newline; where nothing was written, only if the text is complete."""
        if self._began or complete:
            self._write("\n")
