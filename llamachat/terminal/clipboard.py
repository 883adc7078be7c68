"""Text to the clipboard of whoever sits at the terminal, over ssh and through tmux, too."""

from __future__ import annotations

import base64
import subprocess
import sys

from llamachat import settings
from llamachat.terminal.output import emit

# What terminals take at least: hterm's bound on a sequence, https://github.com/chromium/hterm
LONGEST_BYTES = 100_000


def copy(text: str) -> str | None:
    """Set the clipboard; returns why that cannot work, if so.

    A terminal does not say whether it took the text (OSC 52 of xterm's control sequences).
    """
    if not sys.stdout.isatty():
        return "the output is no terminal"
    tmux = settings.in_tmux()
    if tmux and _set_by_tmux(text):
        return None
    if (name := settings.terminal_without_clipboard()) is not None:
        return f"{name} takes no text for the clipboard from programs"
    encoded = base64.b64encode(text.encode("utf-8", "replace")).decode()
    if len(encoded) > LONGEST_BYTES:
        return f"it is too long: {len(encoded):,} bytes, terminals take {LONGEST_BYTES:,}"
    sequence = f"\033]52;c;{encoded}\a"
    escaped = sequence.replace("\033", "\033\033")
    emit(f"\033Ptmux;{escaped}\033\\" if tmux else sequence)
    return None


def _set_by_tmux(text: str) -> bool:
    """Ask tmux itself, which as it comes ignores the sequence; it hands the text on."""
    try:
        asked = ["tmux", "load-buffer", "-w", "-"]
        done = subprocess.run(asked, input=text.encode(), capture_output=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
