"""Penalties, biases and bans against worked numbers and the processors of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from llamachat.engine.decoding import Penalties, Start
from llamachat.engine.processors import Processors
from llamachat.engine.strategies import Greedy, Sample
from llamachat.errors import UsageError

LOGITS = torch.tensor([[2.0, -1.0, 0.5]])


def start(prompt: list[int], **changes: Any) -> Start:
    usual: dict[str, Any] = {"stop_ids": frozenset(), "max_new_tokens": 50, "key": (7, 0, 0)}
    return Start(tuple(prompt), **(usual | changes))


def processed(
    logits: Tensor, history: list[list[int]], n_prompt: int = 0, **penalties: Any
) -> Tensor:
    """Logits after rows of ids, the first `n_prompt` of which are the prompt."""
    begun = start(history[0][:n_prompt])
    rows = torch.tensor(history, dtype=torch.int64).reshape(len(history), -1)
    return Processors(Penalties(**penalties), begun).process(rows, logits)


def test_repetition_penalty_gives_the_worked_numbers_however_often_an_id_was_there() -> None:
    found = processed(LOGITS, [[0, 1, 0, 0]], repetition_penalty=1.2)
    assert found[0].tolist() == pytest.approx([1.666667, -1.2, 0.5])


def test_frequency_and_presence_penalties_give_the_worked_numbers() -> None:
    found = processed(LOGITS, [[0, 0, 1, 0]], frequency_penalty=0.1, presence_penalty=0.5)
    assert found[0].tolist() == pytest.approx([1.2, -1.6, 0.5])


def test_frequency_and_presence_count_the_reply_and_repetition_the_prompt_too() -> None:
    history = [[0, 0, 1]]
    found = processed(LOGITS, history, n_prompt=2, frequency_penalty=0.5, presence_penalty=1)
    assert found[0].tolist() == [2.0, -2.5, 0.5]
    found = processed(LOGITS, history, n_prompt=2, repetition_penalty=2.0)
    assert found[0].tolist() == [1.0, -2.0, 0.5]


@pytest.mark.parametrize("n", [32_000, 128_256])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.3}, lambda: RepetitionPenaltyLogitsProcessor(1.3)),
        ({"no_repeat_ngram_size": 1}, lambda: NoRepeatNGramLogitsProcessor(1)),
        ({"no_repeat_ngram_size": 2}, lambda: NoRepeatNGramLogitsProcessor(2)),
        ({"no_repeat_ngram_size": 3}, lambda: NoRepeatNGramLogitsProcessor(3)),
        (
            {"bad_words": ((5,), (3, 8), (1, 2, 3), (7, 7))},
            lambda: NoBadWordsLogitsProcessor([[5], [3, 8], [1, 2, 3], [7, 7]]),
        ),
        (
            {"logit_bias": ((5, 2.5), (6, -100.0))},
            lambda: SequenceBiasLogitsProcessor({(5,): 2.5, (6,): -100.0}),
        ),
    ],
    ids=lambda it: next(iter(it)) if isinstance(it, dict) else "",
)
def test_a_processor_does_what_that_of_transformers_does(
    ours: dict[str, Any], theirs: Callable[[], LogitsProcessor], n: int
) -> None:
    """Rows have histories of their own, so few different ids that everything repeats."""
    generator = torch.Generator().manual_seed(n)
    logits = torch.randn(4, n, generator=generator) * 3
    logits[:, ::7], logits[:, 1::7] = -math.inf, 0
    history = torch.randint(0, 10, (4, 60), generator=generator)
    expected = theirs()(history, logits.clone())
    assert torch.equal(processed(logits, history.tolist(), **ours), expected)


def test_all_together_are_the_chain_of_transformers_and_leave_the_logits_that_came() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 1000, generator=generator) * 3
    history = torch.randint(0, 30, (3, 200), generator=generator)
    chain = [
        SequenceBiasLogitsProcessor({(5,): 2.5}),
        RepetitionPenaltyLogitsProcessor(1.1),
        NoRepeatNGramLogitsProcessor(2),
        NoBadWordsLogitsProcessor([[5, 6], [9]]),
    ]
    expected, before = LogitsProcessorList(chain)(history, logits.clone()), logits.clone()
    found = processed(
        logits, history.tolist(), repetition_penalty=1.1, no_repeat_ngram_size=2,
        bad_words=((5, 6), (9,)), logit_bias=((5, 2.5),),
    )  # fmt: skip
    assert torch.equal(found, expected)
    assert torch.equal(logits, before)


def test_off_values_do_no_work_at_all() -> None:
    assert Penalties().is_off
    assert processed(LOGITS, [[0]]) is LOGITS


def test_ids_that_the_head_does_not_have_change_nothing() -> None:
    found = processed(
        LOGITS, [[7, 0, 7, 9]], repetition_penalty=2.0, frequency_penalty=1.0,
        no_repeat_ngram_size=1, bad_words=((12,), (7, 13)),
    )  # fmt: skip
    assert found[0].tolist() == [-math.inf, -1.0, 0.5]


def test_a_stop_id_alone_is_no_bad_word() -> None:
    begun = start([0], stop_ids=frozenset({2}))
    banned = Processors(Penalties(bad_words=((2,), (1,))), begun)
    assert banned.process(torch.tensor([[0]]), LOGITS)[0].tolist() == [2.0, -math.inf, 0.5]


def test_bans_that_would_leave_nothing_give_way_row_by_row() -> None:
    found = processed(LOGITS.expand(2, 3), [[0, 1, 2], [0, 1, 1]], no_repeat_ngram_size=1)
    assert found.tolist() == [[2.0, -1.0, 0.5], [-math.inf, -math.inf, 0.5]]


def test_a_bias_of_an_id_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match="id 3, the model has ids 0 to 2"):
        processed(LOGITS, [[0]], logit_bias=((3, 1.0),))


def greedily(options: Greedy | Sample, n: int) -> list[int]:
    strategy = options.start(start([1]))
    logits = torch.tensor([[3.0, 2.5, 2.0, 1.0]])
    return [int(strategy.choose(logits, torch.tensor(i)).tokens) for i in range(n)]


@pytest.mark.parametrize("options", [Greedy, lambda **p: Sample(temperature=0, **p)])
def test_greedy_takes_the_best_after_penalties(options: Any) -> None:
    assert greedily(options(no_repeat_ngram_size=1), 3) == [0, 2, 3]
    assert greedily(options(frequency_penalty=0.7), 5) == [0, 1, 0, 2, 1]
    assert greedily(options(logit_bias=((3, 9.0),)), 2) == [3, 3]


def test_a_draw_avoids_what_is_banned() -> None:
    drawn = greedily(Sample(temperature=50, top_p=1, no_repeat_ngram_size=1), 3)
    assert sorted(drawn) == [0, 2, 3]


@pytest.mark.parametrize(
    "wrong",
    [
        {"repetition_penalty": 0}, {"repetition_penalty": math.inf},
        {"frequency_penalty": math.nan}, {"presence_penalty": math.inf},
        {"no_repeat_ngram_size": -1}, {"no_repeat_ngram_size": 1.5}, {"bad_words": ((),)},
        {"bad_words": ((-1,),)}, {"logit_bias": ((-1, 0.0),)}, {"logit_bias": ((1, math.nan),)},
        {"logit_bias": ((1, 1.0), (1, 2.0))},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("options", [Greedy, Sample])
def test_a_value_out_of_range_is_refused_by_name(options: Any, wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=f"^{name}"):
        options(**wrong)
