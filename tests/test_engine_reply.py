"""The engine: prefix reuse, bounds, endings, and replies that are cut off anywhere."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from llamachat.engine import engine as engine_module
from llamachat.engine import rows
from llamachat.engine.engine import Engine
from llamachat.engine.events import Done, EngineEvent, Prefill, Token
from llamachat.engine.strategies import Greedy, Sample
from llamachat.errors import DamagedFileError, PromptTooLongError, UsageError
from llamachat.kernels.reference import Reference
from llamachat.model.decoder import Decoder

PROMPT = [5, 9, 17, 3, 33, 60, 2, 41]
OTHER = [5, 9, 17, 44, 8, 8]
LAST_ID = 63


@pytest.fixture(scope="module")
def decoder(random_decoder: Callable[..., Decoder]) -> Decoder:
    return random_decoder()


@pytest.fixture(scope="module")
def expected(decoder: Decoder) -> list[list[int]]:
    """What a cold engine answers to PROMPT, and to OTHER."""
    return [cold(decoder, PROMPT), cold(decoder, OTHER)]


@pytest.fixture
def engine(decoder: Decoder) -> Engine:
    return Engine(decoder, ctx_size=48, chunk=3)


def reply(engine: Engine, ids: list[int], decoding: Any = None, **settings: Any) -> list[int]:
    settings = {"max_new_tokens": 10} | settings
    events = engine.generate(ids, decoding or Greedy(), **settings)
    return [event.id for event in events if isinstance(event, Token)]


def cold(decoder: Decoder, ids: list[int], **settings: Any) -> list[int]:
    return reply(Engine(decoder, ctx_size=48), ids, **settings)


def prefill(engine: Engine, ids: list[int]) -> Prefill:
    first = next(iter(engine.generate(ids, Greedy())))
    assert isinstance(first, Prefill)
    return first


def test_a_reply_is_prefill_then_tokens_then_done(engine: Engine) -> None:
    events = list(engine.generate(PROMPT, Greedy(), max_new_tokens=2))
    assert events[:4] == [Prefill(n, 8, reused=0) for n in (0, 3, 6, 8)]
    assert [type(event) for event in events[4:]] == [Token, Token, Done]
    assert events[-1] == Done("length")


def test_a_prompt_that_goes_on_is_run_from_where_it_goes_on(
    engine: Engine, decoder: Decoder
) -> None:
    longer = PROMPT + reply(engine, PROMPT) + [1, 2, 3]
    assert prefill(engine, longer) == Prefill(0, 4, reused=17)  # the last token was never run
    assert reply(engine, longer) == cold(decoder, longer)


def test_a_prompt_that_differs_is_run_from_where_it_differs(
    engine: Engine, decoder: Decoder
) -> None:
    reply(engine, PROMPT)
    assert prefill(engine, OTHER) == Prefill(0, 3, reused=3)
    assert reply(engine, OTHER) == cold(decoder, OTHER)


def test_the_same_prompt_runs_its_last_token_again(engine: Engine) -> None:
    first = reply(engine, PROMPT)
    assert prefill(engine, PROMPT) == Prefill(0, 1, reused=7)
    assert reply(engine, PROMPT) == first


def test_a_prompt_that_is_a_prefix_of_what_is_held_truncates_it(
    engine: Engine, decoder: Decoder
) -> None:
    reply(engine, PROMPT)
    assert reply(engine, PROMPT[:4]) == cold(decoder, PROMPT[:4])
    assert engine.held[:4] == tuple(PROMPT[:4])


def test_a_reply_ends_where_the_context_does(engine: Engine) -> None:
    """The last token needs no slot: nothing follows it."""
    events = list(engine.generate(PROMPT, Greedy()))
    assert sum(isinstance(event, Token) for event in events) == 48 - 8 + 1
    assert events[-1] == Done("length")


def test_a_prompt_as_long_as_the_context_gets_one_token(engine: Engine) -> None:
    assert len(reply(engine, PROMPT * 6)) == 1


def test_a_prompt_longer_than_the_context_is_refused_before_anything_runs(engine: Engine) -> None:
    reply(engine, PROMPT)
    held = engine.held
    with pytest.raises(PromptTooLongError, match="49 tokens, the context 48"):
        engine.generate([*PROMPT * 6, 1], Greedy())
    assert engine.held == held


def test_no_new_tokens_are_given_where_none_are_wanted(engine: Engine) -> None:
    events = list(engine.generate(PROMPT, Greedy(), max_new_tokens=0))
    assert events[-2:] == [Prefill(8, 8, 0), Done("length")]


def test_an_empty_prompt_is_refused(engine: Engine) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        engine.generate([], Greedy())
    with pytest.raises(UsageError, match="no tokens"):
        engine.logits([])


@pytest.mark.parametrize("token", [-1, 64])
def test_an_id_out_of_range_is_refused(engine: Engine, token: int) -> None:
    with pytest.raises(UsageError, match=rf"{token}.* not all in 0 to 63"):
        engine.generate([5, token], Greedy())
    with pytest.raises(UsageError, match=rf"{token}.* not all in 0 to 63"):
        engine.logits([5, token])


def test_stop_ids_end_a_reply(decoder: Decoder) -> None:
    plain = cold(decoder, PROMPT)
    stop = plain[4]
    engine = Engine(decoder, ctx_size=48, stop_ids=frozenset({stop}))
    events = list(engine.generate(PROMPT, Greedy(), max_new_tokens=10))
    ids = [event.id for event in events if isinstance(event, Token)]
    assert ids == plain[: plain.index(stop)]
    assert events[-1] == Done("stop")


def test_the_stop_ids_of_a_call_replace_those_of_the_engine(decoder: Decoder) -> None:
    plain = cold(decoder, PROMPT)
    engine = Engine(decoder, ctx_size=48, stop_ids=frozenset(plain))
    assert reply(engine, PROMPT) == []
    assert reply(engine, PROMPT, stop_ids=frozenset()) == plain


def test_a_reply_ends_where_its_caller_says(engine: Engine, decoder: Decoder) -> None:
    plain = cold(decoder, PROMPT)
    assert reply(engine, PROMPT, ends=lambda ids: len(ids) == 4) == plain[:4]


def test_ids_that_the_tokenizer_does_not_know_are_never_chosen(decoder: Decoder) -> None:
    unbounded = cold(decoder, PROMPT, max_new_tokens=30)
    bound = sorted(unbounded)[len(unbounded) // 2]
    engine = Engine(decoder, ctx_size=48, n_ids=bound)
    assert max(unbounded) >= bound
    assert max(reply(engine, PROMPT, max_new_tokens=30)) < bound
    flat = Sample(temperature=100, top_p=1)
    assert max(reply(engine, PROMPT, flat, max_new_tokens=40)) < bound


@pytest.mark.parametrize("weight", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_not_numbers_are_told_at_once(
    random_decoder: Callable[..., Decoder], weight: str
) -> None:
    engine = Engine(random_decoder(damaged=weight), ctx_size=48)
    with pytest.raises(DamagedFileError, match="not numbers"):
        reply(engine, PROMPT)


def test_a_damaged_embedding_is_told_when_its_token_comes(
    random_decoder: Callable[..., Decoder], decoder: Decoder
) -> None:
    """The last id's embedding is NaN: nothing shows until the reply itself has that id."""
    whole = cold(decoder, PROMPT)
    engine = Engine(random_decoder(damaged="model.embed_tokens.weight"), ctx_size=48)
    events = engine.generate(PROMPT, Greedy(), max_new_tokens=10)
    seen: list[EngineEvent] = []
    with pytest.raises(DamagedFileError, match="not numbers"):
        seen.extend(events)
    ids = [event.id for event in seen if isinstance(event, Token)]
    assert ids == whole[: whole.index(LAST_ID) + 1]


def test_a_seed_makes_a_reply_repeatable(engine: Engine) -> None:
    options = Sample(temperature=1.5, top_p=1, seed=11)
    first = reply(engine, PROMPT, options, max_new_tokens=20)
    assert reply(engine, PROMPT, options, max_new_tokens=20) == first
    assert reply(engine, PROMPT, options, max_new_tokens=8) == first[:8]


@pytest.mark.parametrize("changed", [{"turn": 1}, {"attempt": 1}])
def test_another_turn_or_attempt_draws_anew(engine: Engine, changed: dict[str, int]) -> None:
    options = Sample(temperature=1.5, top_p=1, seed=11)
    assert reply(engine, PROMPT, options, **changed) != reply(engine, PROMPT, options)


def test_without_a_seed_replies_differ(engine: Engine) -> None:
    options = Sample(temperature=1.5, top_p=1)
    assert reply(engine, PROMPT, options) != reply(engine, PROMPT, options)


@pytest.mark.parametrize("n_events", range(8))
def test_a_reply_may_be_closed_at_any_event(
    decoder: Decoder, expected: list[list[int]], n_events: int
) -> None:
    engine = Engine(decoder, ctx_size=48, chunk=3)
    events = engine.generate(PROMPT, Greedy(), max_new_tokens=10)
    for _ in range(n_events):
        next(events)
    events.close()
    whole = PROMPT + expected[0]
    assert engine.held == tuple(whole[: len(engine.held)])
    assert reply(engine, OTHER) == expected[1]


class Interrupting(Reference):
    """Raises KeyboardInterrupt inside its n-th call from now on, after that call's work is done."""

    left = sys.maxsize

    def linear(self, x: Tensor, weight: Any) -> Tensor:
        return self._counted(super().linear(x, weight))

    def attention(self, *arguments: Any) -> Tensor:
        return self._counted(super().attention(*arguments))

    def _counted(self, out: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return out


@pytest.mark.parametrize("call", random.Random(0).sample(range(1, 120), 20))
def test_an_interrupt_inside_a_pass_leaves_an_engine_that_answers_as_a_cold_one(
    random_decoder: Callable[..., Decoder], expected: list[list[int]], call: int
) -> None:
    kernels = Interrupting()
    engine = Engine(random_decoder(kernels), ctx_size=48, chunk=3)
    kernels.left = call
    with pytest.raises(KeyboardInterrupt):
        reply(engine, PROMPT)
    assert [reply(engine, PROMPT), reply(engine, OTHER)] == expected


@contextmanager
def interrupt_before_line(n: int, file: str | None) -> Iterator[None]:
    """Raises KeyboardInterrupt before the n-th line of `file` that is run inside."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename != file:
            return None
        count += event == "line"
        if count == n:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


LINES = [
    *((rows, n) for n in range(1, 61)),  # a truncation, an append
    *((engine_module, n) for n in random.Random(1).sample(range(1, 130), 15)),
]


@pytest.mark.parametrize(("module", "line"), LINES)
def test_an_interrupt_before_any_line_leaves_an_engine_that_answers_as_a_cold_one(
    decoder: Decoder, expected: list[list[int]], module: ModuleType, line: int
) -> None:
    engine = Engine(decoder, ctx_size=48, chunk=3)
    reply(engine, PROMPT, max_new_tokens=2)
    with pytest.raises(KeyboardInterrupt), interrupt_before_line(line, module.__file__):
        reply(engine, OTHER, max_new_tokens=4)
    assert [reply(engine, PROMPT), reply(engine, OTHER)] == expected


def test_logits_are_those_of_every_position(engine: Engine) -> None:
    logits = engine.logits(PROMPT)
    assert logits.shape == (8, 64)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits[3], engine.logits(PROMPT[:4])[-1], atol=1e-5)


@pytest.mark.parametrize("first", [0, 2, 3, 7])
def test_the_last_logits_come_without_the_others(engine: Engine, first: int) -> None:
    """Also where passes of 3 tokens begin before the first one that is wanted."""
    rows = list(engine.iter_logits(PROMPT, first))
    assert torch.allclose(torch.cat(rows), engine.logits(PROMPT)[first:], atol=1e-5)
    assert max(map(len, rows)) <= 3
