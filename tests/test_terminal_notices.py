"""Lines on stderr, on terminals of any width."""

from __future__ import annotations

import pytest

from llamachat.terminal.failure import wrapped


@pytest.mark.parametrize(
    ("text", "columns", "expected"),
    [
        ("short", 40, ["short"]),
        ("a hint of words", 10 + 10, ["a hint of words"]),
        ("llamachat: these words are many", 20, ["llamachat: these", "  words are many"]),
        ("  hint: these words are many", 20, ["  hint: these words", "    are many"]),
        ("at /a/path/that/may/be-copied now", 20, ["at", "  /a/path/that/may/be-copied", "  now"]),
        ("one\n\nthree", 20, ["one", "", "three"]),
        ("words on a terminal of few", 6, ["words on a terminal of few"]),
    ],
)
def test_long_lines_go_on_below_at_words(text: str, columns: int, expected: list[str]) -> None:
    assert wrapped(text, columns).split("\n") == expected
