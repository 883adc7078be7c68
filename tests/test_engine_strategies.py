"""Greedy and sampling: what is chosen, when a reply ends, and which options are refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from llamachat.engine.decoding import Commit, Start
from llamachat.engine.strategies import Greedy, Sample
from llamachat.errors import UsageError

SCORED = torch.tensor([[0.0, -0.5, 1.9]])


def start(**changes: Any) -> Start:
    usual: dict[str, Any] = {
        "prompt": (1,), "stop_ids": frozenset(), "max_new_tokens": 100, "key": (7, 0, 0),
    }  # fmt: skip
    return Start(**(usual | changes))


def drawn(options: Sample, steps: Sequence[int], **changes: Any) -> list[int]:
    strategy = options.start(start(**changes))
    return [int(strategy.choose(SCORED, torch.tensor(step)).tokens) for step in steps]


def test_greedy_takes_the_best() -> None:
    choice = Greedy().start(start()).choose(SCORED, torch.tensor(0))
    assert choice.tokens.tolist() == [2]


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    logits = torch.full((1, 5000), -1.0)
    logits[0, [17, 18, 4000]] = 3.0
    assert Greedy().start(start()).choose(logits, torch.tensor(0)).tokens.tolist() == [17]


@pytest.mark.parametrize("options", [Sample(temperature=0), Sample(top_k=1, top_p=1.0)])
def test_temperature_zero_and_one_candidate_are_greedy(options: Sample) -> None:
    assert drawn(options, range(50)) == [2] * 50


def test_a_tiny_temperature_is_greedy() -> None:
    assert drawn(Sample(temperature=1e-6), range(50)) == [2] * 50


def test_a_draw_depends_on_its_step_alone() -> None:
    options = Sample(temperature=1, top_p=1)
    forwards = drawn(options, range(60))
    assert drawn(options, range(59, -1, -1))[::-1] == forwards
    assert drawn(options, range(60), max_new_tokens=60) == forwards
    assert set(forwards) == {0, 1, 2}


@pytest.mark.parametrize("key", [(8, 0, 0), (7, 1, 0), (7, 0, 1)])
def test_another_key_draws_otherwise(key: tuple[int, int, int]) -> None:
    options = Sample(temperature=2, top_p=1)
    assert drawn(options, range(60), key=key) != drawn(options, range(60))


def accepted(tokens: Sequence[int], **changes: Any) -> list[Commit]:
    """What a reply commits if these tokens are chosen in turn."""
    strategy = Greedy().start(start(**changes))
    return [
        strategy.accept(strategy.choose(torch.eye(9)[token : token + 1], torch.tensor(step)))
        for step, token in enumerate(tokens)
    ]


def test_a_stop_id_ends_a_reply_and_is_no_part_of_it() -> None:
    first, last = accepted([3, 5], stop_ids=frozenset({5, 6}))
    assert (first.ids, first.done) == ((3,), False)
    assert (last.ids, last.done, last.finish_reason) == ((), True, "stop")


def test_the_last_token_of_a_full_reply_is_kept() -> None:
    *_, last = accepted([3, 5], max_new_tokens=2)
    assert (last.ids, last.done, last.finish_reason) == ((5,), True, "length")


def test_a_stop_string_counts_before_the_length() -> None:
    *_, last = accepted([3, 5], max_new_tokens=2, ends=lambda ids: list(ids) == [3, 5])
    assert (last.ids, last.done, last.finish_reason) == ((5,), True, "stop")


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf},
        {"temperature": 1e-30}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_p": math.nan},
        {"min_p": -0.1}, {"min_p": 1.1}, {"seed": -1},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=f"^{name} is .*expected"):
        Sample(**wrong)


def test_a_seed_that_was_named_is_kept() -> None:
    assert Sample(seed=3).seeded(9).seed == 3
    assert Sample().seeded(9).seed == 9
    assert Greedy().seeded(9).seed is None
