"""The last rows of a terminal, which may still change, below rows that never do."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from llamachat.terminal.markdown_rows import folded
from llamachat.terminal.output import emit, size_of

BEGIN, END = "\033[?2026h", "\033[?2026l"  # a frame, which appears at once
HIDE, SHOW = "\033[?25l", "\033[?25h"  # the cursor
NO_WRAP, WRAP = "\033[?7l", "\033[?7h"
# From the second cell on, then the first: where the whole screen is erased at once, tmux keeps a
# copy of it in the scrollback.
ERASE_BELOW = "\033[C\033[J\r\033[K"


class LiveRows:
    """Rows that are written once, and below them rows that are replaced.

    The cursor waits where the latter begin. There a terminal that is resized keeps it, whatever
    becomes of the rows below, which are no longer than a line each and may be cut or wrapped.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._drawn: list[str] = []
        self._size = self.size()
        self._hidden = False

    def size(self) -> os.terminal_size:
        """Columns and lines."""
        return size_of(sys.stdout)

    def draw(
        self, finished: Sequence[Text], live: Sequence[Text], below: Sequence[Text] = ()
    ) -> None:
        """Write rows for good, and replace those below them.

        Args:
            finished: one that is wider than the terminal is wrapped by it, so that a copy is whole.
            live: the last of them are shown, on no more than a third of the terminal.
            below: what stands below them.
        """
        size = self.size()
        parts = [part for row in live for part in folded(row, size.columns)]
        most = max(1, size.lines // 3)
        changing = self._encoded([*parts[-most:], *below])
        if finished or changing != self._drawn or size != self._size:
            emit(self._frame(self._encoded(finished), changing))
        self._drawn, self._size = changing, size

    def _frame(self, kept: list[str], changing: list[str]) -> str:
        """What replaces the live rows.

        All of them, from the first on: while a terminal is resized nobody knows how many lines
        those take that would not change.
        """
        hide, self._hidden = "" if self._hidden else HIDE, True
        written = "".join(f"{row}\n" for row in kept)
        up = f"\033[{len(changing) - 1}A" if len(changing) > 1 else ""
        below = f"{NO_WRAP}{chr(10).join(changing)}{WRAP}{up}\r" if changing else ""
        return f"{BEGIN}{hide}{ERASE_BELOW}{written}{below}{END}"

    def close(self) -> None:
        """Nothing is live any more."""
        emit((ERASE_BELOW if self._drawn else "") + (SHOW if self._hidden else ""))
        self._drawn, self._hidden = [], False

    def _encoded(self, rows: Sequence[Text]) -> list[str]:
        """Rows with the escapes of their styles."""
        if not rows:
            return []
        with self._console.capture() as captured:
            self._console.print(Text("\n").join(rows), soft_wrap=True, end="")
        return captured.get().split("\n")
