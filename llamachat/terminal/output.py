"""stdout: the model's text or JSON, and nothing else."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from llamachat.errors import TransferError, UsageError
from llamachat.files import write_atomically

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
    emit(look(shown(text)) if sys.stdout.isatty() else text)


def emit(text: str) -> None:
    """Write text as it is, escapes of our own and all.

    Raises:
        BrokenPipeError: nobody reads on.
        TransferError: it cannot be written.
    """
    try:
        sys.stdout.write(text)
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


def size_of(stream: TextIO) -> os.terminal_size:
    """Columns and lines of a terminal; the usual ones where it has gone."""
    try:
        return os.get_terminal_size(stream.fileno())
    except OSError:
        return os.terminal_size((80, 24))


def shown(text: str) -> str:
    """Text for a terminal: nobody's words may move the cursor or set the title."""
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


@contextmanager
def collected(path: Path | None) -> Iterator[None]:
    """Let what is written to stdout inside become a file, once it is whole or interrupted.

    What was in the file before stays if something fails. None and "-" are stdout itself.

    Raises:
        UsageError: there can be no such file.
        TransferError: it cannot be written.
    """
    if path is None or str(path) == "-":
        yield
        return
    path = _writable(path)
    stdout, content = sys.stdout, io.BytesIO()
    sys.stdout = io.TextIOWrapper(content, "utf-8", errors="replace", newline="\n")
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        _keep(path, content)
        raise
    else:
        _keep(path, content)
    finally:
        sys.stdout.detach()
        sys.stdout = stdout


def _writable(path: Path) -> Path:
    """The path, if a file can be there: better known before a model is loaded."""
    try:
        path = path.expanduser()
        if path.is_dir():
            raise UsageError(f"{path}: is a folder", hint="name a file")
        if not path.parent.is_dir():
            raise UsageError(f"{path.parent}: no such folder")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"{path}: not writable")
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    return path


def _keep(path: Path, content: io.BytesIO) -> None:
    try:
        write_atomically(path, content.getvalue())
    except OSError as error:
        hint = "write to another file or disk"
        raise TransferError(f"{path}: {error.strerror or error}", hint=hint) from error


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
