"""A terminal in this process: a pseudo-terminal that is stdout, and the screen it would show."""

from __future__ import annotations

import fcntl
import io
import os
import struct
import sys
import termios
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyte
import pytest

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Screen(io.RawIOBase):
    """What a terminal shows, with everything that it scrolled away; it reads what is written."""

    def __init__(self, columns: int, lines: int) -> None:
        self._master, self._slave = os.openpty()
        os.set_blocking(self._master, False)
        self.written = ""
        self._screen = pyte.HistoryScreen(columns, lines, history=20_000)
        self._stream = pyte.ByteStream(self._screen)
        self.resize(columns, lines)

    def fileno(self) -> int:
        return self._slave

    def isatty(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:
        data = bytes(data)
        for i in range(0, len(data), 1024):  # less than a pseudo-terminal holds
            os.write(self._slave, data[i : i + 1024])
            self._receive()
        return len(data)

    def close(self) -> None:
        if not self.closed:
            os.close(self._master)
            os.close(self._slave)
        super().close()

    def resize(self, columns: int, lines: int) -> None:
        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, size)
        self._screen.resize(lines, columns)

    def _receive(self) -> None:
        while True:
            try:
                found = os.read(self._master, 65536)
            except BlockingIOError:
                return
            self.written += found.decode("utf-8", "replace")
            self._stream.feed(found)

    def visible(self) -> list[str]:
        """The lines that are not scrolled away, without blank ones at the end."""
        return _without_blanks([self._text(line) for line in self._lines()])

    def scrollback(self) -> list[str]:
        """Every line there is, without blank ones at the end."""
        above = [self._text(line) for line in self._screen.history.top]
        return _without_blanks(above + [self._text(line) for line in self._lines()])

    def colours(self, start: str) -> list[str]:
        """Those in which the visible lines begin that start with a text."""
        return [line[0].fg for line in self._lines() if self._text(line).startswith(start)]

    def _lines(self) -> list[Mapping[int, pyte.screens.Char]]:
        return [self._screen.buffer[n] for n in range(self._screen.lines)]

    def _text(self, line: Mapping[int, pyte.screens.Char]) -> str:
        return "".join(line[n].data for n in range(self._screen.columns)).rstrip()


@contextmanager
def screen(columns: int, lines: int = 24, **variables: str) -> Iterator[Screen]:
    """Make a terminal of this size stdout."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TMUX", "STY", "TERM_PROGRAM"):
            patch.delenv(name, raising=False)
        for name, value in ({"TERM": "xterm-256color"} | variables).items():
            patch.setenv(name, value)
        shown = Screen(columns, lines)
        with io.TextIOWrapper(io.BufferedWriter(shown), encoding="utf-8") as stdout:
            patch.setattr(sys, "stdout", stdout)
            yield shown


def _without_blanks(lines: list[str]) -> list[str]:
    while lines and not lines[-1]:
        lines.pop()
    return lines
