"""The program `llamachat`."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command line; an interrupt while it is still being imported leaves at once."""
    signal.signal(signal.SIGINT, lambda _number, _frame: os._exit(130))
    from llamachat.cli.app import app

    sys.exit(app(prog_name="llamachat"))


if __name__ == "__main__":
    main()
