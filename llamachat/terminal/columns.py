"""Texts that grow side by side, in columns of one terminal; lines are printed once, when whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.text import Text

from llamachat.terminal.output import shown

NARROWEST = 30
GAP = 2
REDRAW_S = 0.05
Footer: TypeAlias = Callable[[int], Sequence[str]]
MARK = "»"  # where a text parts from the first one


class Column:
    """One text, wrapped. Its lines never change once they are whole."""

    def __init__(self, width: int) -> None:
        self.ended = False
        self._width = width
        self._text = ""
        self._span: tuple[int, int] | None = None
        self._first = 0  # where the first line begins that is not all printed
        self._printed = 0  # rows of that line

    def write(self, text: str) -> None:
        """The text goes on."""
        self._text += text

    def mark(self, span: tuple[int, int]) -> None:
        """Point out a token: its first character, and its end."""
        self._span = span

    def rows(self, console: Console) -> list[Text]:
        """The rows that are not printed; while the text goes on, the last may change."""
        return [row for rows in self._lines(console) for row in rows][self._printed :]

    def skip(self, n: int, console: Console) -> None:
        """So many rows are printed now."""
        self._printed += n
        lines = self._text[self._first :].split("\n")
        for line, rows in zip(lines, self._lines(console), strict=False):
            if self._printed < len(rows):
                break
            self._printed -= len(rows)
            self._first += len(line) + 1

    def _lines(self, console: Console) -> list[list[Text]]:
        """The rows of each line."""
        return [
            list(line.wrap(console, self._width, tab_size=4)) or [Text()]
            for line in self._styled().split("\n", allow_blank=True)
        ]

    def _styled(self) -> Text:
        """What is not printed, with the mark."""
        text = self._text[self._first :]
        if self._span is None or self._span[0] < self._first:
            return Text(shown(text))
        start, end = (min(at - self._first, len(text)) for at in self._span)
        marked = MARK + shown(text[start:end])
        return Text.assemble(shown(text[:start]), (marked, "bold underline"), shown(text[end:]))


class Columns:
    """Columns of equal width below their headings.

    Rows that are whole in every column are printed and left alone; only those below are redrawn.
    """

    def __init__(self, headings: Sequence[str], footer: Footer, console: Console) -> None:
        self._console, self._footer = console, footer
        self._width = column_width(len(headings), console.width)
        self._columns = [Column(self._width) for _ in headings]
        self._live = Live(
            console=console, auto_refresh=False, transient=True,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._drawn = 0.0
        self._print([Text(shown(heading), "bold") for heading in headings])

    def write(self, index: int, text: str) -> None:
        """A text goes on."""
        self._columns[index].write(text)
        if time.monotonic() - self._drawn >= REDRAW_S:
            self._draw()

    def mark(self, index: int, span: tuple[int, int]) -> None:
        """Point out a token."""
        self._columns[index].mark(span)

    def end(self, index: int) -> None:
        """A text is whole."""
        self._columns[index].ended = True

    def close(self) -> None:
        """Nothing follows but the lines below each column."""
        for index in range(len(self._columns)):
            self.end(index)
        self._draw()
        self._live.stop()
        footers = map(self._footer, range(len(self._columns)))
        self._print([Text("\n".join(map(shown, lines)), "dim") for lines in footers])

    def _draw(self) -> None:
        rows = [column.rows(self._console) for column in self._columns]
        open_ = [len(own) - 1 for own, c in zip(rows, self._columns, strict=True) if not c.ended]
        n_whole = min(open_, default=max(map(len, rows)))
        if not self._live.is_started:
            self._live.start()
        for n in range(n_whole):
            self._console.print(self._row([own[n : n + 1] for own in rows]), soft_wrap=True)
        for own, column in zip(rows, self._columns, strict=True):
            column.skip(min(n_whole, len(own)), self._console)
        below = range(n_whole, min(max(map(len, rows)), n_whole + self._console.height - 1))
        self._live.update(
            Text("\n").join(self._row([own[n : n + 1] for own in rows]) for n in below),
            refresh=True,
        )
        self._drawn = time.monotonic()

    def _print(self, cells: Sequence[Text]) -> None:
        """Cells side by side, each wrapped to its column."""
        wrapped = [list(cell.wrap(self._console, self._width)) for cell in cells]
        for n in range(max(map(len, wrapped))):
            self._console.print(self._row([own[n : n + 1] for own in wrapped]), soft_wrap=True)

    def _row(self, cells: Sequence[Sequence[Text]]) -> Text:
        """A cell, or none, of each column, without blanks at the end."""
        row = Text()
        for cell in cells:
            for text in cell:
                row.append_text(text)
            row.append(" " * (self._width - sum(cell_len(text.plain) for text in cell) + GAP))
        row.rstrip()
        return row


def column_width(n: int, width: int) -> int:
    """Of each of n columns on a terminal as wide."""
    return (width - GAP * (n - 1)) // n
