"""Stop strings: never shown, not even in part, however a text is split."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from llamachat.engine.stops import StopFilter, first_stop

LETTERS = st.text("abc", max_size=14)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted({min(cut, len(text)) for cut in cuts}), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def expected(text: str, stops: list[str]) -> str:
    """What stands before the stop string that is complete first, read letter by letter."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@given(LETTERS, STOPS, st.lists(st.integers(0, 14)))
@example("abcb", ["abcc", "bc"], [])
@example("abc", ["abcd", "bc"], [1, 2])
def test_what_is_shown_is_the_text_before_the_stop_string(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    stream = StopFilter(stops)
    shown = [stream.feed(piece) for piece in pieces_of(text, cuts)]
    shown.append(stream.flush())
    assert "".join(shown) == expected(text, stops)
    assert stream.stopped == any(stop in text for stop in stops)


@given(LETTERS, STOPS)
def test_text_is_held_back_only_while_it_may_become_a_stop_string(
    text: str, stops: list[str]
) -> None:
    stream = StopFilter(stops)
    shown = ""
    for end, letter in enumerate(text, start=1):
        shown += stream.feed(letter)
        if stream.stopped:
            break
        held = text[len(shown) : end]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_nothing_is_shown_after_a_stop_string() -> None:
    stream = StopFilter(["STOP"])
    assert [stream.feed(text) for text in ("a STOP b", "c", "STOP")] == ["a ", "", ""]
    assert stream.flush() == ""


def test_without_stop_strings_text_passes_at_once() -> None:
    stream = StopFilter(["", ""])
    assert [stream.feed("a"), stream.feed("b"), stream.flush()] == ["a", "b", ""]


def test_the_first_stop_is_the_one_that_is_complete_first() -> None:
    assert first_stop("xabcd", ["abcd", "bc"]) == 2
    assert first_stop("xabc", ["bc", "abc"]) == 1
    assert first_stop("xabc", ["q"]) is None
