"""The open continuations of beam search, below the text of a reply while it comes."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.cells import cell_len

from llamachat import settings
from llamachat.chat.events import OpenText, Tails
from llamachat.terminal.failure import one_line
from llamachat.terminal.output import shown, size_of, write

DIM, PLAIN = "\033[2m", "\033[0m"
SAVE, RESTORE = "\0337", "\0338"
DOWN, ERASE_BELOW = "\033D", "\033[J"


class TextOverTails:
    """Writes text to stdout; on a terminal, open continuations show below it until it goes on."""

    def __init__(self) -> None:
        self._watched = sys.stdout.isatty() and not settings.terminal_is_dumb()
        self._showing = False
        self._column = 0
        self._at_line_start = True

    def write(self, text: str, *, look: Callable[[str], str] = str) -> None:
        """Take the continuations away, and go on where the text ended."""
        self.clear()
        write(text, look=look)
        self._column = self._column_after(shown(text)) if self._watched else 0
        self._at_line_start = text.endswith("\n") if text else self._at_line_start

    def show(self, tails: Tails) -> None:
        """Show these continuations in place of the last ones."""
        if not self._watched:
            return
        self.clear()
        columns, lines = size_of(sys.stdout)
        if self._column >= columns - 1:
            return  # a terminal forgets that its line is full when the cursor moves
        below = tails.tails[: lines - 2]
        room = f"{DOWN * len(below)}\033[{len(below)}A" if below else ""
        listed = "".join(f"\r\n{DIM}{tail_line(tail, columns - 1)}{PLAIN}" for tail in below)
        sys.stdout.write(f"{room}{SAVE}{listed}{RESTORE}")
        sys.stdout.flush()
        self._showing = True

    def end(self) -> None:
        """Nothing follows; the last line is ended."""
        self.clear()
        if not self._at_line_start:
            self.write("\n")

    def clear(self) -> None:
        """Take the continuations away."""
        if self._showing:
            self._showing = False
            sys.stdout.write(ERASE_BELOW)
            sys.stdout.flush()

    def _column_after(self, text: str) -> int:
        """Where the cursor stands after `text`; a full line counts as its width."""
        columns = size_of(sys.stdout).columns
        *above, last = text.expandtabs(8).split("\n")
        column = 0 if above else self._column
        for character in last:
            width = cell_len(character)
            column = width if column + width > columns else column + width
        return column


def tail_line(tail: OpenText, columns: int) -> str:
    """A score, and the end of a continuation, cut to fit."""
    score = f"{tail.score:8.3f}  "
    text = one_line(shown(tail.text))
    room = columns - len(score)
    if cell_len(text) > room:
        while text and cell_len(text) > room - 1:
            text = text[1 + (cell_len(text) - room) // 2 :]
        text = f"…{text}"
    return f"{score}{text}"[: max(0, columns)]
