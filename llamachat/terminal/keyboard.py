"""The keyboard of the terminal, where stdin is something else."""

from __future__ import annotations

import os
import sys

from llamachat.errors import UsageError

DEVICE = "CONIN$" if sys.platform == "win32" else "/dev/tty"


def take_keyboard() -> None:
    """Let stdin be the terminal's keyboard, once what was piped in has been read.

    Raises:
        UsageError: no terminal belongs to this process.
    """
    if sys.stdin.isatty():
        return
    try:
        keyboard = os.open(DEVICE, os.O_RDWR)
    except OSError as error:
        raise UsageError(
            f"a conversation needs a keyboard; {DEVICE}: {error.strerror or error}",
            hint="without -i one question is answered",
        ) from error
    os.dup2(keyboard, 0)  # its number, too: whoever reads a terminal asks for it
    os.close(keyboard)
    # For as long as the program runs: hence no `with`.
    sys.stdin = os.fdopen(0, encoding=sys.stdin.encoding, errors="replace", closefd=False)
