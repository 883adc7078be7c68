"""The program `llamachat`."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; a signal while it is still being imported leaves at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: os._exit(128 + number))
    replace_closed_streams()
    from llamachat.cli.app import run
    from llamachat.terminal.log import keep_warnings

    keep_warnings()
    os._exit(run())  # to take torch down in order would take another half second


def replace_closed_streams() -> None:
    """Put something behind each standard stream that is closed, as by `>&-`.

    Else the next file that is opened gets its number. What comes instead reads as empty, and
    refuses what is written to stdout.
    """
    for name, mode, flags in (
        ("stdin", "r", os.O_RDONLY),
        ("stdout", "w", os.O_RDONLY),
        ("stderr", "w", os.O_WRONLY),
    ):
        if getattr(sys, name) is None:
            # By its number, and for as long as the program runs: hence no Path and no `with`.
            stream = open(os.open(os.devnull, flags), mode, encoding="utf-8")  # noqa: PTH123, SIM115
            setattr(sys, name, stream)


if __name__ == "__main__":
    main()
