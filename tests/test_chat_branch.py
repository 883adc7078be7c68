"""`ChatSession.branch`: a reply goes on from another choice, and comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import scripted
from test_chat_session import engine_of, session_of
from test_chat_session import run as run_text

import llamachat
from llamachat.chat.events import Done, Event, Prefill, Probabilities, Probability, Text
from llamachat.chat.options import Options, Said
from llamachat.chat.session import ChatSession
from llamachat.chat.spoken import Spoken, alternatives
from llamachat.chat.templates import Message
from llamachat.engine import events as engine_events
from llamachat.errors import UsageError

OPTIONS = {
    "greedy": Options(Said(strategy="greedy")),
    "sampled": Options(Said(temperature=1.0, top_p=0.95, seed=5)),
}
AT, MORE = 5, 12


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> llamachat.Model:
    return llamachat.load(tiny_llama(), dtype="float32", threads=1)


def asked(model: llamachat.Model, how: str) -> tuple[ChatSession, list[int]]:
    """A chat with one reply, and the prompt of that."""
    chat = ChatSession(model, options=OPTIONS[how], max_new_tokens=MORE, logprobs=4)
    _, done = run(chat.send("Why?"))
    return chat, chat.prompt_ids[: done.prompt_tokens]


def run(events: Iterator[Event]) -> tuple[list[Event], Done]:
    *before, done = events
    assert isinstance(done, Done)
    return before, done


def spoken(chat: ChatSession) -> Spoken:
    assert chat.spoken is not None
    return chat.spoken


def offered(chat: ChatSession, index: int = AT) -> tuple[Probability, ...]:
    return alternatives(spoken(chat).tokens[index].probabilities)


def other(chat: ChatSession) -> int:
    """The likeliest alternative at AT that was not chosen and does not end the reply."""
    stop_ids = chat.model.tokenizer.stop_ids | {spoken(chat).ids[AT]}
    return next(one.id for one in offered(chat) if one.id not in stop_ids)


@pytest.mark.parametrize("how", OPTIONS)
def test_a_branch_is_what_a_cold_engine_says_after_the_same_ids(
    model: llamachat.Model, how: str
) -> None:
    chat, prompt = asked(model, how)
    token = other(chat)
    begun = [*spoken(chat).ids[:AT], token]
    before, done = run(chat.branch(AT, token))
    model.engine.clear()
    cold = model.engine.generate(
        [*prompt, *begun], OPTIONS[how].decoding(), max_new_tokens=MORE, continued=len(begun)
    )
    said = [event.id for event in cold if isinstance(event, engine_events.Token)]
    assert said
    assert spoken(chat).ids == (*begun, *said)
    assert done.token_ids == (token, *said)
    assert chat.messages[-1].ids == (*begun, *said)
    assert max(event.total for event in before if isinstance(event, Prefill)) == 1


def test_probabilities_are_the_log_softmax_of_the_models_logits(model: llamachat.Model) -> None:
    chat, prompt = asked(model, "sampled")
    run(chat.branch(AT, other(chat)))
    ids = spoken(chat).ids
    logits = model.logits([*prompt, *ids])[len(prompt) - 1 :, : model.tokenizer.vocab_size]
    raw = logits.log_softmax(-1)
    for index, logprobs in zip(range(len(ids)), raw, strict=False):
        for one in offered(chat, index):
            assert one.logprob == pytest.approx(logprobs[one.id].item(), abs=1e-5)


@pytest.mark.parametrize("how", OPTIONS)
def test_the_old_choice_brings_the_old_reply_back_without_running_anything(
    model: llamachat.Model, how: str
) -> None:
    chat, _ = asked(model, how)
    old = spoken(chat)
    run(chat.branch(AT, other(chat)))
    assert spoken(chat).ids != old.ids
    assert old.ids[AT] in [one.id for one in offered(chat)]
    before, done = run(chat.branch(AT, old.ids[AT]))
    assert not any(isinstance(event, Prefill) for event in before)
    assert spoken(chat).ids == old.ids
    assert chat.messages[-1] == old.message
    assert done.token_ids == old.ids[AT:]
    assert done.timings.decode_s == 0


def test_a_choice_that_was_not_among_the_likeliest_stays_an_alternative() -> None:
    known = scripted.probabilities(ord("a"))
    rare = Probability(ord("r"), -9.0, 0.0)
    made = engine_events.Token(rare.id, Probabilities(rare, known.top))
    reply = Spoken(Message("assistant", "r"), (made,), "stop")
    assert alternatives(made.probabilities) == (*known.top, rare)
    changed = reply.choosing(0, ord("a"))
    assert changed.probabilities is not None
    assert changed.probabilities.chosen == known.chosen
    assert alternatives(changed.probabilities) == (*known.top, rare)


def scripted_chat(question: str, **settings: object) -> ChatSession:
    speaker = scripted.model()
    chat = ChatSession(speaker, template=scripted.template(), logprobs=2, **settings)  # type: ignore[arg-type]
    run(chat.send(question))
    return chat


def test_a_choice_that_stops_ends_the_reply_there() -> None:
    chat = scripted_chat("abcd")
    before, done = run(chat.branch(2, scripted.END))
    assert (before, done.finish_reason, done.token_ids) == ([], "stop", ())
    assert chat.messages[-1].content == "ab"
    run(chat.send("recall"))
    assert chat.messages[-1].content == "abcd | recall"


def test_a_choice_that_completes_a_stop_string_ends_the_reply_there() -> None:
    chat = scripted_chat("ab0cd", stop=["b1"])
    _, done = run(chat.branch(2, ord("1")))
    assert (done.finish_reason, done.token_ids) == ("stop", (ord("1"),))
    assert chat.messages[-1].content == "a"


def test_text_goes_on_where_the_choice_was_made() -> None:
    chat = scripted_chat("ab0cd")
    before, done = run(chat.branch(2, ord("1")))
    assert "".join(event.text for event in before if isinstance(event, Text)) == "1cd"
    assert done.text == "1cd"
    assert len(done.logprobs) == 3
    assert chat.messages[-1].content == "ab1cd"


def test_a_branch_of_a_branch_can_bring_back_either() -> None:
    chat = scripted_chat("0a0")
    run(chat.branch(0, ord("1")))
    run(chat.branch(2, ord("1")))
    assert chat.messages[-1].content == "1a1"
    run(chat.branch(0, ord("0")))
    assert chat.messages[-1].content == "0a0"
    run(chat.branch(0, ord("1")))
    assert chat.messages[-1].content == "1a1"


@pytest.mark.parametrize(("index", "token"), [(-1, 97), (4, 97), (0, 98), (0, scripted.START)])
def test_what_was_no_alternative_is_refused_and_changes_nothing(index: int, token: int) -> None:
    chat = scripted_chat("abcd")
    before = chat.messages
    with pytest.raises(UsageError):
        chat.branch(index, token)
    assert chat.messages == before
    assert chat.spoken is not None


def test_a_reply_is_known_until_another_stands_last() -> None:
    chat = scripted_chat("0")
    run(chat.branch(0, ord("1")))
    run(chat.send("2"))
    assert spoken(chat).ids == (ord("2"),)
    chat.undo()
    assert spoken(chat).ids == (ord("1"),)
    chat.edit_reply("2")
    assert chat.spoken is None
    with pytest.raises(UsageError, match="no reply"):
        chat.branch(0, ord("0"))


def test_a_reply_that_is_continued_after_an_undo_forgets_the_one_that_was_undone() -> None:
    chat = scripted_chat("a0", max_new_tokens=1)
    chat.max_new_tokens = None
    run(chat.send("a1 was undone"))
    chat.undo()
    run(chat.continue_())
    assert chat.messages[-1].content == "a0"
    run(chat.branch(1, ord("1")))
    assert chat.messages[-1].content == "a1"


def test_an_interrupted_branch_keeps_the_choice_and_what_came_after_it() -> None:
    chat = scripted_chat("ab0cdef")
    events = chat.branch(2, ord("1"))
    for event in events:
        if event == Text("c", scripted.probabilities(ord("c"))):
            break
    events.throw(KeyboardInterrupt())
    events.close()
    assert chat.messages[-1].content == "ab1c"
    run(chat.continue_())
    assert chat.messages[-1].content == "ab1cdef"
    run(chat.branch(2, ord("0")))
    assert chat.messages[-1].content == "ab0cdef"


def test_a_reply_without_probabilities_has_no_alternatives() -> None:
    chat = session_of(b"abc")
    run_text(chat.send("?"))
    assert not spoken(chat).has_probabilities
    with pytest.raises(UsageError, match="no alternative"):
        chat.branch(0, ord("a"))
    assert len(engine_of(chat).prompts) == 1
