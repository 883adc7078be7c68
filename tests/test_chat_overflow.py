"""When the context fills: turns are left out, summarized, or the question is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from test_chat_session import (
    ASSISTANT,
    END,
    SYSTEM,
    USER,
    Script,
    contents,
    engine_of,
    run,
    session_of,
    turn,
)

from llamachat.chat.context import NOTE, Overflow, check_overflow
from llamachat.chat.events import Summarizing, Trimmed
from llamachat.chat.session import ChatSession
from llamachat.chat.usage import usage
from llamachat.errors import PromptTooLongError, UsageError

QUESTION, ANSWER = "q" * 40, b"a" * 40  # a turn of 84 tokens; 4 are too many for 360 of 480


def full(overflow: Overflow, *scripts: Sequence[Script], ctx_size: int = 480) -> ChatSession:
    """Four turns that fill the context; the next is answered by the scripts."""
    session = session_of(*[ANSWER] * 4, *scripts, ctx_size=ctx_size, overflow=overflow)
    for _ in range(4):
        run(session.send(QUESTION))
    return session


def test_error_refuses_the_question_with_the_numbers_and_keeps_the_conversation() -> None:
    session = full("error", [ANSWER])
    before = session.messages
    with pytest.raises(PromptTooLongError, match=r"has 379 tokens, 360 of 480") as refused:
        session.send(QUESTION)
    assert "/undo" in (refused.value.hint or "")
    assert session.messages == before
    session.undo()
    assert run(session.send(QUESTION))[1].trimmed == Trimmed(0, 0)


@pytest.mark.parametrize("overflow", ["trim", "error", "summarize"])
def test_one_message_that_cannot_fit_is_refused(overflow: Overflow) -> None:
    session = full(overflow)
    with pytest.raises(PromptTooLongError):
        session.send("x" * 500)
    assert session.turns == 4


def test_summarize_puts_a_note_of_the_models_own_in_place_of_the_turns() -> None:
    session = full("summarize", [b"They met."], [b"Yes."])
    begun, *events, done = session.send(QUESTION)
    assert begun == Summarizing(turns=2)
    asked, prompt = engine_of(session).prompts[-2:]
    going = turn(QUESTION, ANSWER.decode())
    assert asked[: 2 * len(going)] == going * 2  # which the cache holds
    note = [SYSTEM, *f"{NOTE}They met.".encode(), END]
    assert prompt == [*note, *going * 2, USER, *QUESTION.encode(), END, ASSISTANT]
    assert done.trimmed == Trimmed(2, 379 - len(prompt), note="They met.")
    assert done.trimmed in events
    assert session.messages[-1].content == "Yes."
    assert session.turns == 5
    assert engine_of(session).asked[-2]["max_new_tokens"] == 480 // 8
    assert engine_of(session).asked[-2]["decoding"].width == 1


def test_a_note_stays_beside_the_system_message_until_the_next_which_is_told_of_it() -> None:
    session = full("summarize", [b"First."], [ANSWER], [ANSWER], [b"Second."], [ANSWER])
    session.system = "Be brief."
    run(session.send(QUESTION))
    while session.note == "First.":
        run(session.send(QUESTION))
    asked, prompt = (bytes(i for i in ids if i < 256) for ids in engine_of(session).prompts[-2:])
    assert asked.startswith(f"Be brief.\n\n{NOTE}First.".encode())
    assert prompt.startswith(f"Be brief.\n\n{NOTE}Second.".encode())
    assert session.system == "Be brief."


@pytest.mark.parametrize(("summary", "problem"), [(b"", "no room"), (b"x" * 300, "does not fit")])
def test_turns_are_left_out_where_a_summary_cannot_stand_for_them(
    summary: bytes, problem: str
) -> None:
    session = full("summarize", [summary], [ANSWER])
    trimmed = run(session.send(QUESTION))[1].trimmed
    assert (trimmed.turns, trimmed.note, session.note) == (2, None, None)
    assert problem in (trimmed.problem or "")


def test_an_interrupted_summary_leaves_the_conversation_as_it_was() -> None:
    session = full("summarize", [b"Th", KeyboardInterrupt()])
    before = session.messages
    _, done = run(session.send(QUESTION))
    assert done.finish_reason == "interrupted"
    assert done.token_ids == ()
    assert (session.messages, session.note, session.forgotten) == (before, None, 0)


def test_undo_brings_turns_back_that_were_summarized() -> None:
    session = full("summarize", [b"They met."], [b"Yes."])
    prompt = session.prompt_ids
    run(session.send(QUESTION))
    session.undo()
    assert (session.prompt_ids, session.note) == (prompt, None)


def test_another_draw_of_a_summarized_turn_needs_no_other_summary() -> None:
    session = full("summarize", [b"They met."], [b"Yes."], [b"No."])
    run(session.send(QUESTION))
    assert run(session.regenerate())[1].trimmed.turns == 0
    assert contents(session)[-1] == "No."
    assert engine_of(session).prompts[-1] == engine_of(session).prompts[-2]


def test_usage_tells_where_every_token_went() -> None:
    session = full("summarize", [b"They met."], [b"Yes."])
    session.system = "Be brief."
    run(session.send(QUESTION))
    found = usage(session)
    assert (found.system, found.summary) == (9, 9)
    assert [(t.number, t.question, t.reply) for t in found.turns] == [
        (3, 40, 40), (4, 40, 40), (5, 40, 4),
    ]  # fmt: skip
    assert (found.forgotten, found.forgotten_tokens) == (2, 160)
    said = found.system + found.summary + sum(t.question + t.reply for t in found.turns)
    assert said + found.template + found.free == found.ctx_size
    assert found.used == len(session.prompt_ids)


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match=r"shrink.*trim, error, summarize"):
        check_overflow("shrink")
