"""Code as it comes: highlighted lines, printed a few at a time, in linear time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from rich.syntax import Syntax
from rich.text import Text

THEME = "ansi_dark"  # the terminal's own colours, no background
BATCH = 8  # lines that are printed together
AHEAD, BEFORE = 4, 8  # lines around them that a lexer sees
LONGEST = 2_000  # characters of a line that is worth colours; lexers may be slow on longer ones
_OPENING = re.compile(r"( {0,3})(`{3,}|~{3,})(.*)")


def highlighted(lines: Sequence[str], info: str) -> list[Text]:
    """A row for each line.

    Args:
        lines: the code.
        info: what stands behind the opening fence; its first word names the language.
    """
    syntax = _syntax(info.split()[0]) if info.split() else None
    if syntax is None or max(map(len, lines), default=0) > LONGEST:
        return [Text(line) for line in lines]
    text = syntax.highlight("\n".join(lines))
    rows = list(text.split("\n", allow_blank=True))[: len(lines)]
    if [row.plain for row in rows] != list(lines):  # a lexer may lose characters
        return [Text(line) for line in lines]
    return rows


class OpenCode:
    """A fenced block that is not closed yet.

    Args:
        opening: the line with the opening fence.
    """

    def __init__(self, opening: str) -> None:
        found = _OPENING.match(opening)
        assert found is not None, "the line opens a block of code"
        self._indent, self._info = len(found[1]), found[3].strip()
        self._closing = re.compile(rf" {{0,3}}{found[2][0]}{{{len(found[2])},}}[ \t]*")
        self._before: list[str] = []  # printed
        self._lines: list[str] = []  # not printed

    def closes(self, line: str) -> bool:
        """Whether the line is the closing fence."""
        return self._closing.fullmatch(line) is not None

    def write(self, line: str) -> list[Text]:
        """One more line; returns the rows that are finished."""
        self._lines.append(self._dedented(line))
        if len(self._lines) < BATCH + AHEAD:
            return []
        rows = self.rows()[:BATCH]
        self._before = _context(self._before + self._lines[:BATCH])
        del self._lines[:BATCH]
        return rows

    def rows(self, partial: str = "") -> list[Text]:
        """What is not printed, and the line that comes."""
        lines = [*self._lines, self._dedented(partial)] if partial else self._lines
        if not lines:
            return []
        return highlighted([*self._before, *lines], self._info)[len(self._before) :]

    def _dedented(self, line: str) -> str:
        return line[min(self._indent, len(line) - len(line.lstrip(" "))) :]


def _context(lines: list[str]) -> list[str]:
    """The last lines, from the first of them that is not indented: it begins something."""
    lines = lines[-BEFORE:]
    starts = (i for i, line in enumerate(lines) if line[:1].strip(" \t})]"))
    return lines[next(starts, len(lines)) :]


@lru_cache(maxsize=8)
def _syntax(language: str) -> Syntax | None:
    """What colours a language; None if nobody knows it."""
    lexer = Syntax("", language).lexer  # made once: it takes longer than a few lines
    return Syntax("", lexer, theme=THEME) if lexer is not None else None
