"""What reaches a terminal, and how a text ends."""

from __future__ import annotations

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamachat.terminal.output import Lines, shown


@given(st.text())
def test_no_control_character_reaches_a_terminal(text: str) -> None:
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown(text) if c not in "\n\t")


@pytest.mark.parametrize(
    "text", ["Größe\n\tx", "漢字\u3000", "👨‍👩‍👧", "a\u00a0b", "שלום", "e\u0301"]
)
def test_what_people_write_reaches_it_unchanged(text: str) -> None:
    assert shown(text) == text


@pytest.mark.parametrize("text", ["\x1b[2J", "\r", "\x9b31m", "\u202e", "\x07", "\u2028"])
def test_what_moves_the_cursor_is_spelled_out(text: str) -> None:
    assert shown(text).isprintable()


@given(pieces=st.lists(st.text("ab\n")))
def test_text_in_pieces_ends_with_one_newline(pieces: list[str]) -> None:
    kept, sys.stdout = sys.stdout, io.StringIO()
    try:
        lines = Lines()
        for piece in pieces:
            lines.write(piece)
        lines.end(complete=True)
        written = sys.stdout.getvalue()
    finally:
        sys.stdout = kept
    assert written == "".join(pieces).rstrip("\n") + "\n"
