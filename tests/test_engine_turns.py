"""A long conversation with a real engine: every turn pays for its new tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import llamachat
from llamachat.chat.events import Done, Prefill
from llamachat.chat.options import Options, Said
from llamachat.engine.engine import Engine
from llamachat.engine.events import Token

QUESTIONS = [f"{i}. Why? {'é€' * (i % 3)}<|im_end|>" for i in range(20)]
STOP_IDS = frozenset({257, *range(0, 256, 16)})  # many, so that some replies end by themselves
OPTIONS = {
    "greedy": Options(Said(strategy="greedy")),
    "sampled": Options(Said(temperature=1.0, top_p=0.95, seed=5)),
}


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> llamachat.Model:
    return llamachat.load(tiny_llama(max_position_embeddings=4096), dtype="float32", threads=1)


def new_engine(model: llamachat.Model) -> Engine:
    return Engine(
        model.engine.decoder, ctx_size=4096, stop_ids=STOP_IDS, n_ids=model.tokenizer.vocab_size
    )


@pytest.mark.parametrize("how", OPTIONS)
def test_twenty_turns_run_only_what_is_new_and_answer_as_cold_engines_do(
    model: llamachat.Model, how: str
) -> None:
    """A reply that was cut by its length has a last token that was chosen, but not run."""
    chat = llamachat.ChatSession(
        replace(model, engine=new_engine(model)), system="Go on.", options=OPTIONS[how],
        max_new_tokens=12,
    )  # fmt: skip
    seen: list[int] = []
    n_run, endings = 0, set()
    for turn, question in enumerate(QUESTIONS):
        first, *_, done = chat.send(question)
        assert isinstance(first, Prefill)
        assert isinstance(done, Done)
        prompt = chat.prompt_ids[: done.prompt_tokens]
        assert prompt[: len(seen)] == seen
        assert (first.reused, first.total) == (n_run, len(prompt) - n_run)
        cold = new_engine(model).generate(
            prompt, OPTIONS[how].decoding(), max_new_tokens=12, turn=turn
        )
        assert list(done.token_ids) == [event.id for event in cold if isinstance(event, Token)]
        seen = [*prompt, *done.token_ids]
        n_run = len(seen) - (done.finish_reason == "length")
        endings.add(done.finish_reason)
    assert endings == {"stop", "length"}


def test_an_interrupted_turn_and_a_new_draw_reuse_what_is_the_same(model: llamachat.Model) -> None:
    chat = llamachat.ChatSession(
        replace(model, engine=new_engine(model)), options=OPTIONS["sampled"], max_new_tokens=30
    )
    events = chat.send(QUESTIONS[0])
    while not (isinstance(event := next(events), Prefill) and event.done == event.total):
        pass
    next(events)
    events.close()
    first, *_ = chat.regenerate()
    assert isinstance(first, Prefill)
    assert first.total == 1
    first, *_ = chat.send(QUESTIONS[1])
    assert isinstance(first, Prefill)
    assert first.reused >= len(chat.model.tokenizer.encode(QUESTIONS[0]))
