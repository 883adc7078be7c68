"""Replies that repeat themselves: where they are ended, and where they are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamachat.engine.engine import Engine
from llamachat.engine.events import Done, Token
from llamachat.engine.loops import FEWEST_TOKENS, LONGEST_BLOCK, LoopDetector
from llamachat.engine.strategies import Greedy
from llamachat.model.decoder import Decoder

BLOCK = list(range(20))


def ended_after(ids: Sequence[int], times: int) -> int | None:
    """So many ids were needed to see a loop."""
    loops = LoopDetector(times)
    return next((n for n, token in enumerate(ids, start=1) if loops.add(token)), None)


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_block_that_was_repeated_so_often_is_a_loop(times: int) -> None:
    text = [500, 501, 502]
    assert ended_after(text + BLOCK * (times + 2), times) == len(text) + 20 * (times + 1)


def test_what_is_said_once_more_after_something_else_is_none() -> None:
    assert ended_after([*BLOCK, 99, *BLOCK, 98, *BLOCK], 1) is None


def test_a_short_block_must_fill_some_tokens() -> None:
    assert ended_after([7] * (FEWEST_TOKENS - 1), 3) is None
    assert ended_after([7] * FEWEST_TOKENS, 3) == FEWEST_TOKENS


def test_the_longest_block_that_is_found_is_bounded() -> None:
    for length, found in ((LONGEST_BLOCK, 2 * LONGEST_BLOCK), (LONGEST_BLOCK + 1, None)):
        assert ended_after(list(range(length)) * 2, 1) == found


@given(st.lists(st.integers(0, 2), max_size=90), st.integers(1, 3))
def test_loops_are_found_as_soon_as_they_are_complete(ids: list[int], times: int) -> None:
    def loops(said: list[int]) -> bool:
        return any(
            said[-size:][period:] == said[-size:][:-period]
            for period in range(1, len(said))
            for size in [max((times + 1) * period, FEWEST_TOKENS)]
            if size <= len(said)
        )

    expected = next((n for n in range(1, len(ids) + 1) if loops(ids[:n])), None)
    assert ended_after(ids, times) == expected


@pytest.mark.parametrize("draft", [0, 8])
def test_a_reply_that_loops_is_ended_and_says_why(
    random_decoder: Callable[..., Decoder], draft: int
) -> None:
    """This model comes to a loop by itself."""
    engine = Engine(random_decoder(), ctx_size=256)
    prompt = [5, 9, 17, 3, 33, 60, 2, 41]
    plain, stopped = (
        list(engine.generate(prompt, Greedy(), draft=draft, stop_loops=times)) for times in (0, 2)
    )
    whole, ids = ([e.id for e in events if isinstance(e, Token)] for events in (plain, stopped))
    last = stopped[-1]
    assert isinstance(last, Done)
    assert last.finish_reason == "loop"
    assert ids == whole[: ended_after(whole, 2)]
    assert len(ids) < len(whole)
