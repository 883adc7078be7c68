"""`/continue`: a reply that was cut goes on as if it never had been."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_chat_session import contents, engine_of, run, session_of

import llamachat
from llamachat.chat.events import Done, Event, Prefill
from llamachat.chat.options import Options, Said
from llamachat.chat.session import ChatSession
from llamachat.errors import UsageError

WHOLE = 48
OPTIONS = {
    "greedy": Options(Said(strategy="greedy")),
    "sampled": Options(Said(temperature=1.0, top_p=0.95, seed=5)),
}


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> llamachat.Model:
    return llamachat.load(tiny_llama(), dtype="float32", threads=1)


def session(model: llamachat.Model, how: str, n: int, **settings: object) -> ChatSession:
    return ChatSession(model, options=OPTIONS[how], max_new_tokens=n, **settings)  # type: ignore[arg-type]


def last(events: Iterator[Event]) -> Done:
    *_, done = events
    assert isinstance(done, Done)
    return done


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("cuts", [(1,), (20,), (WHOLE - 1,), (7, 19, 20)])
def test_a_reply_goes_on_with_the_same_ids_and_the_same_text(
    model: llamachat.Model, how: str, cuts: tuple[int, ...]
) -> None:
    whole = session(model, how, WHOLE)
    expected = last(whole.send("Why?"))
    cut = session(model, how, cuts[0])
    last(cut.send("Why?"))
    for before, after in zip(cuts, (*cuts[1:], WHOLE), strict=True):
        cut.max_new_tokens = after - before
        events = list(cut.continue_())
        assert isinstance(events[0], Prefill)
        assert events[0].total <= 1
    assert cut.messages == whole.messages
    assert isinstance(events[-1], Done)
    assert events[-1].finish_reason == expected.finish_reason


def test_a_reply_of_another_attempt_goes_on_with_the_draws_of_that_attempt(
    model: llamachat.Model,
) -> None:
    whole, cut = (session(model, "sampled", n) for n in (WHOLE, 9))
    for chat in (whole, cut):
        last(chat.send("Why?"))
        last(chat.regenerate())
    cut.max_new_tokens = WHOLE - 9
    assert last(cut.continue_()).attempt == 1
    assert cut.messages == whole.messages


def test_a_reply_that_ended_by_itself_has_nothing_to_add(model: llamachat.Model) -> None:
    """Its next choice is the one that ended it."""
    chat = session(model, "sampled", 400)
    for turn in range(20):
        if last(chat.send(f"{turn}?")).finish_reason == "stop":
            break
    before = chat.messages
    done = last(chat.continue_())
    assert (done.finish_reason, done.token_ids, done.text) == ("stop", (), "")
    assert chat.messages == before


def test_what_is_streamed_is_only_what_is_new() -> None:
    chat = session_of([b"one ", KeyboardInterrupt()], b"two", b"three")
    run(chat.send("?"))
    pieces, done = run(chat.continue_())
    assert "".join(pieces) == done.text == "two"
    assert done.token_ids == tuple(b"two")
    assert contents(chat) == ["?", "one two"]
    engine = engine_of(chat)
    assert engine.prompts[1] == [*engine.prompts[0], *b"one "]
    assert engine.asked[1]["continued"] == 4


def test_a_stop_string_over_the_seam_ends_the_reply_and_is_not_kept() -> None:
    chat = session_of([b"one ST", KeyboardInterrupt()], b"OP two", stop=["STOP"])
    run(chat.send("?"))
    assert contents(chat) == ["?", "one ST"]
    assert run(chat.continue_())[0] == []
    assert contents(chat) == ["?", "one "]


def test_what_only_looked_like_a_stop_string_is_not_shown_twice() -> None:
    chat = session_of([b"one ST", KeyboardInterrupt()], b"AY", stop=["STOP"])
    run(chat.send("?"))
    pieces, _ = run(chat.continue_())
    assert "".join(pieces) == "AY"
    assert contents(chat) == ["?", "one STAY"]


def test_half_a_character_becomes_a_whole_one() -> None:
    chat = session_of([b"a\xe2\x82", KeyboardInterrupt()], b"\xacb")
    run(chat.send("?"))
    run(chat.continue_())
    assert contents(chat) == ["?", "a€b"]


def test_an_interrupt_before_anything_new_keeps_what_there_was() -> None:
    chat = session_of([b"one", KeyboardInterrupt()], [KeyboardInterrupt()])
    run(chat.send("?"))
    before = chat.messages
    assert run(chat.continue_())[1].finish_reason == "interrupted"
    assert chat.messages == before


def test_text_after_a_stop_string_goes_on_from_the_text_that_was_kept() -> None:
    chat = session_of(b"one STOP", b"two", stop=["STOP"])
    run(chat.send("?"))
    chat.stop = ()
    run(chat.continue_())
    assert contents(chat) == ["?", "one two"]
    assert engine_of(chat).asked[1]["continued"] == len("one ")


def test_without_a_reply_there_is_nothing_to_continue() -> None:
    with pytest.raises(UsageError, match="no reply"):
        session_of(system="Be brief.").continue_()


def test_a_new_draw_is_new_also_after_an_undo() -> None:
    chat = session_of(b"a", b"b", b"c", b"d")
    run(chat.send("1"))
    run(chat.regenerate())
    run(chat.send("2"))
    chat.undo()
    assert run(chat.regenerate())[1].attempt == 2
    assert engine_of(chat).asked[-1]["attempt"] == 2


def test_what_beams_said_is_gone_on_with(model: llamachat.Model) -> None:
    chat = ChatSession(
        model, options=Options(Said(strategy="beam:3")), max_new_tokens=9, stop_loops=4
    )
    first = last(chat.send("Why?"))
    begun = chat.messages[-1]
    *events, second = chat.continue_()
    assert isinstance(events[0], Prefill)
    assert events[0].total <= 1
    assert isinstance(second, Done)
    assert second.token_ids
    assert chat.messages[-1].ids == (*first.token_ids, *second.token_ids)
    assert chat.messages[-1].content.startswith(begun.content.rstrip("\ufffd"))
