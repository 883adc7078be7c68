"""Every change of a conversation, and that what was before it comes back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from test_chat_session import (
    TOKENIZER,
    Marked,
    Model,
    Scripted,
    contents,
    engine_of,
    run,
    session_of,
)

from llamachat.chat.events import Text
from llamachat.chat.options import Options, Said
from llamachat.chat.session import ChatSession
from llamachat.chat.templates import Message
from llamachat.errors import UsageError

Change = Callable[[ChatSession], object]
CHANGES: dict[str, Change] = {
    "/regen": lambda s: run(s.regenerate()),
    "/continue": lambda s: run(s.continue_()),
    "/edit": lambda s: run(s.edit("three?")),
    "/edit-reply": lambda s: s.edit_reply("other"),
    "/clear": lambda s: s.clear(),
    "/system": lambda s: setattr(s, "system", "Be long."),
    "/load": lambda s: s.restore([Message("user", "x"), Message("assistant", "y")]),
    "/compare": lambda s: s.answer(s.asking(), s.spoken),
    "turn 3": lambda s: run(s.send("three")),
}


def two_turns() -> ChatSession:
    session = session_of(b"a", b"b", b"c", b"d", system="Be brief.")
    for question in ("one", "two"):
        run(session.send(question))
    return session


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_before_a_change_is_back_after_undo(name: str) -> None:
    session = two_turns()
    before, prompt, spoken = session.messages, session.prompt_ids, session.spoken
    CHANGES[name](session)
    assert session.changes == ("turn 1", "turn 2", name)
    assert session.undo() == 1
    assert (session.messages, session.prompt_ids, session.spoken) == (before, prompt, spoken)


def test_several_changes_are_taken_back_at_once() -> None:
    session = two_turns()
    run(session.regenerate())
    session.edit_reply("other")
    assert session.undo(3) == 3
    assert contents(session) == ["Be brief.", "one", "a"]


def test_an_edited_question_takes_the_place_of_its_turn() -> None:
    session = two_turns()
    _, done = run(session.edit("three?"))
    assert done.text == "c"
    assert contents(session) == ["Be brief.", "one", "a", "three?", "c"]
    assert engine_of(session).asked[-1]["turn"] == 1


def test_an_edit_that_gets_no_answer_changes_nothing() -> None:
    session = session_of(b"a", [KeyboardInterrupt()])
    run(session.send("one"))
    run(session.edit("two"))
    assert contents(session) == ["one", "a"]
    assert session.changes == ("turn 1",)


def test_an_edited_reply_is_text_alone_and_is_rendered_so() -> None:
    session = two_turns()
    session.edit_reply("other")
    assert session.messages[-1] == Message("assistant", "other", None)
    assert engine_of(session).scripts == [[b"c"], [b"d"]]
    assert bytes(i for i in session.prompt_ids if i < 256).endswith(b"twoother")


def test_a_reply_edited_to_what_it_is_stays_the_ids_that_it_was() -> None:
    session = two_turns()
    session.edit_reply("b")
    assert session.messages[-1].ids == tuple(b"b")
    assert "/edit-reply" not in session.changes


@pytest.mark.parametrize("change", [lambda s: s.edit("x"), lambda s: s.edit_reply("x")])
def test_without_a_turn_there_is_nothing_to_edit(change: Change) -> None:
    with pytest.raises(UsageError, match=r"no (question|reply)"):
        change(session_of(system="Be brief."))


def test_a_conversation_that_goes_on_has_its_turns_to_take_back() -> None:
    messages = two_turns().messages
    session = ChatSession(Model(Scripted([])), template=Marked(), messages=messages)
    assert session.messages == messages
    assert session.undo() == 1
    assert session.messages == messages[:3]
    assert session.undo(5) == 1
    assert session.messages == messages[:1]


def test_another_model_is_told_the_text_now_and_after_undo() -> None:
    session = two_turns()
    other = Model(Scripted([[b"z"]]), TOKENIZER)
    session.stop = ("mine",)
    session.use(other, Marked("##"), Options(Said()))
    assert all(message.ids is None for message in session.messages)
    assert [m.content for m in session.messages] == ["Be brief.", "one", "a", "two", "b"]
    assert session.stop == ("mine", "##")
    session.undo()
    assert all(message.ids is None for message in session.messages)
    events = session.send("three")
    assert [event.text for event in events if isinstance(event, Text)] == ["z"]


def test_another_draw_after_an_undone_one_is_a_new_one() -> None:
    session = session_of(b"a", b"b", b"c")
    run(session.send("?"))
    run(session.regenerate())
    session.undo()
    run(session.regenerate())
    assert [asked["attempt"] for asked in engine_of(session).asked] == [0, 1, 2]
