"""Probabilities on a terminal: tokens by their looks, and a walk to another choice."""

from __future__ import annotations

import math
import re
import sys

import pytest

if sys.platform == "win32":
    pytest.skip("POSIX pseudo-terminals", allow_module_level=True)

from terminals import CTRL_C, ESCAPES, READING, Open, Terminal, wait_for_keys

from llamachat.chat.spoken import percent

LEFT, RIGHT, UP, DOWN, HOME, END, ESCAPE = (
    f"\x1b{keys}" for keys in ("[D", "[C", "[A", "[B", "[H", "[F", "")
)
WALKING, PICTURE_END = "leaves", "\x1b[?7h"
COLOURS = "plain 50%+, cyan 20%+, yellow 5%+, red below"
NO_COLOURS = "plain 20%+, underlined 5%+, bold below"
NO_COLOR = {"NO_COLOR": "1"}


def opened(open_terminal: Open, columns: int = 80, **variables: str) -> Terminal:
    terminal = open_terminal("--logprobs", "2", columns=columns, **variables)
    terminal.wait()
    return terminal


def walk(terminal: Terminal, *keys: str) -> str:
    """Open the view and type keys, one after the other; returns what the last one changed."""
    terminal.send("/probs\r")
    terminal.child.expect_exact(WALKING)
    for key in ("", *keys):
        terminal.child.send(key)
        terminal.child.expect_exact(PICTURE_END)
    return ESCAPES.sub("", terminal.child.before or "")


def raw_reply(terminal: Terminal, question: str) -> str:
    """What is written for a reply, escapes and all."""
    terminal.send(f"{question}\r")
    terminal.child.expect_exact(READING)
    return str(terminal.child.before).strip("\r\n")


def test_improbable_tokens_are_coloured_and_a_legend_comes_once(open_terminal: Open) -> None:
    terminal = opened(open_terminal, 60)
    terminal.told()
    shown = raw_reply(terminal, "a0b1c2d3")
    assert shown == "a\x1b[4;31m0\x1b[0mb\x1b[33m1\x1b[0mc\x1b[36m2\x1b[0md3"
    raw_reply(terminal, "again")
    legend = terminal.told()
    assert legend == f"[probability: {COLOURS}]\n"
    assert len(legend) <= 60


def test_without_colours_they_are_underlined(open_terminal: Open) -> None:
    terminal = opened(open_terminal, 60, **NO_COLOR)
    terminal.told()
    assert raw_reply(terminal, "0b1c2") == "\x1b[1;4m0\x1b[0mb\x1b[4m1\x1b[0mc2"
    assert terminal.told() == f"[probability: {NO_COLOURS}]\n"


def test_spaces_and_ends_of_lines_stay_as_they_are(open_terminal: Open) -> None:
    terminal = opened(open_terminal)
    terminal.ask("once for the legend")
    assert raw_reply(terminal, '"""0\n0"""') == "\x1b[4;31m0\x1b[0m\r\n\x1b[4;31m0\x1b[0m"


def test_a_character_of_several_tokens_looks_like_the_least_probable(open_terminal: Open) -> None:
    terminal = opened(open_terminal)
    terminal.ask("once for the legend")
    assert raw_reply(terminal, "é漢é") == "é\x1b[4;31m漢\x1b[0mé"
    changed = walk(terminal, RIGHT, RIGHT)
    assert "·" in changed
    assert "<0xE7>" in changed


@pytest.mark.parametrize(("columns", "variables"), [(60, NO_COLOR), (100, {}), (200, {})])
def test_the_view_shows_a_token_and_its_alternatives(
    open_terminal: Open, columns: int, variables: dict[str, str]
) -> None:
    terminal = opened(open_terminal, columns, **variables)
    terminal.ask("ab0")
    terminal.send("/probs\r")
    terminal.child.expect_exact(WALKING)
    written = terminal.child.before or ""
    shown = ESCAPES.sub("", written)
    assert max(map(len, shown.split("\n"))) <= columns
    assert "token 1 of 3" in shown
    assert re.search(r"\* 1 +'a' +50\.0 % +100\.0 %", shown)
    assert re.search(r" 2 +id 257 +50\.0 % +–", shown)
    parts = {part for sgr in re.findall(r"\x1b\[([0-9;]*)m", written) for part in sgr.split(";")}
    assert ("31" in parts) is not bool(variables)
    assert "7" in parts


def test_arrow_keys_walk_and_enter_or_a_number_goes_on_from_another_choice(
    open_terminal: Open,
) -> None:
    terminal = opened(open_terminal)
    terminal.ask("ab0cd")
    walk(terminal, RIGHT, RIGHT, RIGHT, LEFT, DOWN)
    terminal.child.send("\r")
    assert terminal.wait().strip("\n").endswith("ab1cd")
    terminal.told()
    terminal.ask("/show prompt")
    assert "ab1cd<|im_end|>" in terminal.told()
    walk(terminal, END, LEFT, HOME, RIGHT, RIGHT, DOWN, UP)
    terminal.child.send("9")  # no such choice
    terminal.child.send("1")
    assert terminal.wait().strip("\n").endswith("ab0cd")
    assert terminal.ask("recall") == "ab0cd | recall"


def test_keys_leave_the_view_and_the_reply_stays(open_terminal: Open) -> None:
    terminal = opened(open_terminal)
    terminal.ask("ab0")
    for key in (ESCAPE, CTRL_C, "q", "\r"):  # Enter: on what was chosen anyway
        walk(terminal, RIGHT)
        terminal.child.send(key)
        assert "0" not in terminal.wait()
    terminal.told()
    terminal.ask("/show prompt")
    assert "ab0<|im_end|>" in terminal.told()


def test_the_view_fits_a_low_terminal(open_terminal: Open) -> None:
    terminal = opened(open_terminal, 60)
    terminal.child.setwinsize(10, 60)
    terminal.ask("x " * 400 + "0")
    shown = walk(terminal, END)
    assert "too small" not in shown
    terminal.child.send("2")
    assert terminal.wait().strip("\n").endswith("1")


def test_a_terminal_that_knows_no_escapes_gets_a_list(open_terminal: Open) -> None:
    terminal = open_terminal("--logprobs", "2", TERM="dumb")
    terminal.child.expect_exact(">>> ")
    for line, seen in (("a0", r"a0\s+a0\r\n>>> "), ("/probs", r"/probs.*\r\n>>> ")):
        wait_for_keys(terminal.child)
        terminal.child.send(f"{line}\r")
        terminal.child.expect(seen)
    told = terminal.told()
    assert "\x1b" not in told
    assert "probability:" not in told
    assert re.search(r"2 +1\.0 % +100\.0 % +'0' +or '1' 99\.0 %", told)


@pytest.mark.parametrize(
    ("p", "expected"),
    [(1.0, "100.0 %"), (0.123, " 12.3 %"), (0.0004, " <0.1 %"), (0.0, "      –")],
)
def test_a_probability_has_one_width(p: float, expected: str) -> None:
    assert percent(math.log(p) if p else -math.inf) == expected
