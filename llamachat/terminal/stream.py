"""A reply on a terminal, as it comes: text on stdout, signs of life on stderr."""

from __future__ import annotations

import sys
import time

from llamachat.chat.events import Done, Event, Prefill, Text, Trimmed
from llamachat.terminal.failure import printable, say

PATIENCE_S = 1.0  # of prefill before it shows progress


class ReplyView:
    """Shows the events of one reply; text is only ever appended."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._at_line_start = True
        self._progress_shown = False

    def show(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Text):
            self._clear_progress()
            sys.stdout.write(shown(event.text))
            sys.stdout.flush()
            self._at_line_start = event.text.endswith("\n")
        elif isinstance(event, Prefill):
            self._progress(event)
        elif isinstance(event, Trimmed):
            say(f"[{trimmed_notice(event)}]")
        elif isinstance(event, Done):
            self._end_line()
            if event.finish_reason == "interrupted":
                say("[interrupted]" if event.token_ids else "[interrupted: the question is gone]")
            elif event.finish_reason == "length":
                say(f"[stopped after {len(event.token_ids)} tokens]")

    def interrupted(self) -> None:
        """The reply ended without its last event."""
        self._end_line()
        say("[interrupted]")

    def close(self) -> None:
        """Leave the cursor at the start of a line."""
        self._end_line()

    def _progress(self, event: Prefill) -> None:
        elapsed = time.monotonic() - self._began
        if elapsed < PATIENCE_S or event.done >= event.total or not sys.stderr.isatty():
            return
        rate = event.done / elapsed
        left = f", {(event.total - event.done) / rate:.0f} s left" if rate else ""
        text = f"reading {event.done:,} of {event.total:,} tokens, {rate:.0f} tok/s{left}"
        sys.stderr.write(f"\r\033[K{text} (Ctrl-C stops)")
        sys.stderr.flush()
        self._progress_shown = True

    def _clear_progress(self) -> None:
        if self._progress_shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
            self._progress_shown = False

    def _end_line(self) -> None:
        self._clear_progress()
        if not self._at_line_start:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._at_line_start = True


def shown(text: str) -> str:
    """Text for a terminal: a model must not move the cursor or set the title."""
    return "".join(c if c in "\n\t" else printable(c) for c in text)


def trimmed_notice(event: Trimmed) -> str:
    """The line that says what the context had no room for."""
    return f"the context is full: the oldest {event.turns} turn(s) were left out"
