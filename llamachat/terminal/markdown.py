"""Markdown as it comes: text in, rows out, those of finished blocks once and for all.

What is finished depends on whole lines alone, so any pieces of a text give the same rows. Only the
open end of the text is ever parsed, and the work is linear in its length.
"""

from __future__ import annotations

import re

from markdown_it.tree import SyntaxTreeNode as Node
from rich.text import Text

from llamachat.terminal.markdown_code import OpenCode
from llamachat.terminal.markdown_rows import Rows, is_blank, parser, units
from llamachat.terminal.output import shown

LONGEST = 16_000  # characters of a block; one that is longer is cut
LIVE = 4_000  # characters of an open block that is still drawn as what it is
PATIENT = 1_000  # characters from which on an open block is parsed at each quarter more
ENDED_BY_BLANK = ("paragraph", "heading", "table", "blockquote")
_BEGINS = re.compile(r" {0,3}([#>`~_*+-]|\d{1,9}[.)])")
_ITEM = re.compile(r" {0,3}([*+-]|\d{1,9}[.)])( {1,4}(?! )| |$)")
_MARKERS = re.compile(r"[-=*_#>`~+|:\s]*|\s*\d+[.)]?\s*")


class Markdown:
    """A text that grows, in rows.

    Args:
        rows: draws the blocks.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows, self._parser = rows, parser()
        self._line: list[str] = []  # pieces of the line that is not whole
        self._line_size = 0
        self._lines: list[str] = []  # of blocks that may go on
        self._size, self._parsed_from = 0, 0
        self._in_table = (
            False  # which ends with a blank line at the latest, and is whole or nothing
        )
        self._indent = 0  # of what belongs to the open item of a list, in any case
        self._code: OpenCode | None = None
        self._before = ""  # the type of the last block that is finished

    def write(self, text: str, width: int) -> list[Text]:
        """The text goes on; returns the rows that are finished."""
        rows: list[Text] = []
        *ends, rest = text.split("\n")
        for end in ends:
            self._add(end)
            rows += self._cut(width)
            rows += self._write_line(self._take_line(), width)
        self._add(rest)
        return rows + self._cut(width)

    def open_rows(self, width: int) -> list[Text]:
        """What is not finished, as it would be if nothing followed."""
        partial = shown("".join(self._line))
        if self._code is not None:
            return self._code.rows(partial[-LIVE:])
        lines = self._lines if _MARKERS.fullmatch(partial) else [*self._lines, partial]
        if self._size + len(partial) > LIVE:
            return [Text(line) for line in "\n".join(lines)[-LIVE:].split("\n")]
        return self._rows.sequence(units(self._parse(lines)), lines, width, self._before)

    def finish(self, width: int) -> list[Text]:
        """Nothing follows; returns the last rows."""
        rows = self._write_line(self._take_line(), width) if self._line_size else []
        if self._code is not None:
            return rows + self._end_code()
        return rows + self._finish_blocks(width)

    def _add(self, piece: str) -> None:
        self._line.append(piece)
        self._line_size += len(piece)

    def _take_line(self) -> str:
        line = shown("".join(self._line).removesuffix("\r"))
        self._line, self._line_size = [], 0
        return line

    def _cut(self, width: int) -> list[Text]:
        """Finish as much as is too long of a line that is not code."""
        rows: list[Text] = []
        while self._line_size > LONGEST and self._code is None:
            line = "".join(self._line)
            cut = line.rfind(" ", LONGEST // 2, LONGEST) + 1 or LONGEST
            self._lines.append(shown(line[:cut]))
            rows += self._finish_blocks(width)
            self._line, self._line_size = [line[cut:]], len(line) - cut
        return rows

    def _write_line(self, line: str, width: int) -> list[Text]:
        if self._code is not None:
            if self._code.closes(line):
                return self._end_code()
            return self._code.write(line)
        was_blank = not self._lines or not self._lines[-1].strip()
        self._lines.append(line)
        self._size += len(line) + 1
        return self._settle(width) if self._may_end(line, was_blank) else []

    def _may_end(self, line: str, was_blank: bool) -> bool:
        """Whether with this line a block may have ended, or an item of a list."""
        if self._in_table and not line.strip():
            return True
        if self._size < self._parsed_from:
            return False
        if self._size > LONGEST and not self._in_table:
            return True
        if not line.strip():
            return not (was_blank or self._indent)
        if line[: self._indent].isspace():
            return False
        return _BEGINS.match(line) is not None or (was_blank and bool(self._indent))

    def _settle(self, width: int) -> list[Text]:
        """Finish every block that no line can change any more."""
        blocks = units(self._parse(self._lines))
        if not blocks:
            return []
        *ended, last = blocks
        if last.type == "fence":
            return self._open_code(ended, last, width)
        too_long = self._size > LONGEST and not ended and last.type != "table"
        if _is_over(last, self._lines[-1]) or too_long:
            return self._finish(blocks, len(self._lines), width)
        rows = self._finish(ended, last.map[0] if last.map and ended else 0, width)
        self._indent = _content_offset(self._lines) if last.type == "list_item" else 0
        self._in_table = last.type == "table"
        self._parsed_from = self._size * 5 // 4 if self._size > PATIENT else 0
        return rows

    def _finish(self, blocks: list[Node], end: int, width: int) -> list[Text]:
        """Finish blocks, and forget their lines, but for a blank one at the end."""
        rows = self._rows.sequence(blocks, self._lines, width, self._before)
        self._before = blocks[-1].type if blocks else self._before
        blank = end > 0 and is_blank(self._lines[end - 1])
        self._lines = [*[""] * blank, *self._lines[end:]]
        self._size = sum(map(len, self._lines)) + len(self._lines)
        self._parsed_from = self._indent = 0
        self._in_table = False
        return rows

    def _finish_blocks(self, width: int) -> list[Text]:
        return self._finish(units(self._parse(self._lines)), len(self._lines), width)

    def _open_code(self, before: list[Node], fence: Node, width: int) -> list[Text]:
        """From now on lines of code are finished as they come."""
        start = fence.map[0] if fence.map else 0
        opening, *code = self._lines[start:]
        rows = self._finish(before, start, width)
        rows += [Text()] if self._before else []
        self._code, self._lines, self._size = OpenCode(opening), [], 0
        for line in code:
            rows += self._write_line(line, width)
        return rows

    def _end_code(self) -> list[Text]:
        assert self._code is not None, "there is code"
        rows = self._code.rows()
        self._code, self._before = None, "fence"
        return rows

    def _parse(self, lines: list[str]) -> Node:
        return Node(self._parser.parse("\n".join(lines)))


def _is_over(block: Node, line: str) -> bool:
    """Whether a block has ended with this line, whatever follows."""
    if block.type == "heading" and block.markup.startswith("#"):
        return True
    return block.type == "hr" or (not line.strip() and block.type in ENDED_BY_BLANK)


def _content_offset(item: list[str]) -> int:
    """How far the lines of an item of a list are indented, which begins with the first of them."""
    found = _ITEM.match(next(filter(str.strip, item)))
    return found.end() if found else 0
