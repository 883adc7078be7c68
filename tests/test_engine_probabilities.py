"""Log-probabilities beside tokens: of the model alone, and after penalties and filters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llamachat.engine.engine import Engine
from llamachat.engine.events import Probabilities, Token
from llamachat.engine.strategies import Greedy, Sample
from llamachat.errors import UsageError

PROMPT = [5, 9, 2, 7]


@pytest.fixture
def engine(random_decoder: Callable[..., Any]) -> Engine:
    return Engine(random_decoder(), ctx_size=64)


def tokens_of(engine: Engine, decoding: Greedy | Sample, logprobs: int) -> list[Token]:
    events = engine.generate(PROMPT, decoding, max_new_tokens=8, logprobs=logprobs)
    return [event for event in events if isinstance(event, Token)]


def told(token: Token) -> Probabilities:
    assert token.probabilities is not None
    return token.probabilities


def test_raw_ones_are_the_log_softmax_of_the_models_logits(engine: Engine) -> None:
    found = tokens_of(engine, Sample(temperature=3, top_k=3, seed=1), 4)
    logits = engine.logits([*PROMPT, *(token.id for token in found)])
    for token, raw in zip(found, logits.log_softmax(-1)[len(PROMPT) - 1 :], strict=False):
        chosen, top = told(token).chosen, told(token).top
        assert chosen.id == token.id
        assert chosen.logprob == pytest.approx(raw[token.id].item(), abs=1e-5)
        assert [one.id for one in top] == raw.topk(4).indices.tolist()
        assert [one.logprob for one in top] == pytest.approx(raw.topk(4).values.tolist(), abs=1e-5)


def test_filtered_ones_are_what_was_drawn_from(engine: Engine) -> None:
    for token in tokens_of(engine, Sample(temperature=3, top_k=3, top_p=1, seed=1), 4):
        left = [one.filtered_logprob for one in told(token).top]
        assert left[3] == -math.inf
        assert sum(map(math.exp, left)) == pytest.approx(1)
        assert token.id in [one.id for one in told(token).top[:3]]


def test_of_greedy_they_are_those_after_the_penalties(engine: Engine) -> None:
    first = tokens_of(engine, Greedy(), 1)[0].id
    found = tokens_of(engine, Greedy(logit_bias=((first, -1000.0),)), 2)[0]
    assert found.id != first
    assert told(found).top[0].id == first
    assert told(found).top[0].filtered_logprob < -900
    assert told(found).chosen.filtered_logprob > told(found).chosen.logprob


@pytest.mark.parametrize("decoding", [Greedy(), Sample(temperature=2, seed=3)])
def test_asking_for_them_changes_no_token(engine: Engine, decoding: Greedy | Sample) -> None:
    asked, plain = (tokens_of(engine, decoding, k) for k in (3, 0))
    assert [token.id for token in asked] == [token.id for token in plain]
    assert all(token.probabilities is None for token in plain)


@pytest.mark.parametrize("k", [-1, 21])
def test_a_number_out_of_range_is_refused(engine: Engine, k: int) -> None:
    with pytest.raises(UsageError, match="expected 0 to 20"):
        engine.generate(PROMPT, Greedy(), logprobs=k)


def test_a_small_vocabulary_has_fewer_alternatives() -> None:
    from llamachat.engine.decoding import Choice
    from llamachat.engine.probabilities import probabilities

    logits = torch.tensor([[1.0, 2.0]])
    found = probabilities(logits, Choice(torch.tensor([0]), logprobs=logits.log_softmax(-1)), 20)
    assert found is not None
    assert [one.id for one in found.top] == [1, 0]
