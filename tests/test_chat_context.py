"""When the context fills: which turns go, and how seldom."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from llamachat.chat.context import Fitted, fit, turns_of
from llamachat.chat.templates import Message

SYSTEM = Message("system", "s" * 10)


def conversation(*sizes: int) -> list[Message]:
    """A system message of 10 tokens, turns of two equal messages, and a last question."""
    messages = [SYSTEM]
    for i, size in enumerate(sizes[:-1]):
        letter = chr(ord("a") + i)
        messages += [Message("user", letter * size), Message("assistant", letter * size)]
    return [*messages, Message("user", "?" * sizes[-1])]


def encode(messages: Sequence[Message]) -> list[int]:
    """A token a letter."""
    return [ord(letter) for message in messages for letter in message.content]


def fitted(
    messages: Sequence[Message], ctx_size: int = 100, forgotten: int = 0, reply: int | None = None
) -> Fitted:
    return fit(messages, encode, forgotten=forgotten, ctx_size=ctx_size, max_new_tokens=reply)


def test_a_conversation_that_fits_is_left_alone() -> None:
    messages = conversation(10, 10, 10)
    assert fitted(messages) == Fitted(encode(messages), forgotten=0, dropped_tokens=0)


def test_a_quarter_of_the_context_is_kept_for_the_reply() -> None:
    assert fitted(conversation(10, 10, 25)).forgotten == 0  # 75 tokens
    assert fitted(conversation(10, 10, 26)).forgotten > 0


def test_a_short_reply_needs_less_room() -> None:
    assert fitted(conversation(10, 10, 40), reply=10).forgotten == 0
    assert fitted(conversation(10, 10, 41), reply=10).forgotten > 0


def test_whole_oldest_turns_go_and_the_system_message_stays() -> None:
    found = fitted(conversation(10, 15, 16))
    kept = [SYSTEM, Message("user", "b" * 15), Message("assistant", "b" * 15)]
    assert found.ids == encode([*kept, Message("user", "?" * 16)])
    assert (found.forgotten, found.dropped_tokens) == (1, 20)


def test_trimming_makes_room_for_turns_to_come() -> None:
    """Else each later turn would trim again, and run the whole prompt anew."""
    found = fitted(conversation(5, 5, 5, 5, 5, 5, 6))  # 76 of 75 allowed
    assert len(found.ids) <= 0.75 * 75
    assert found.forgotten == 2


def test_turns_once_forgotten_stay_so() -> None:
    messages = conversation(10, 10, 10)
    found = fitted(messages, forgotten=1)
    assert (found.forgotten, found.dropped_tokens) == (1, 0)
    assert encode([Message("user", "a")])[0] not in found.ids


def test_the_last_question_stays_even_if_it_does_not_fit() -> None:
    found = fitted(conversation(10, 10, 200))
    assert found.forgotten == 2
    assert found.ids == encode([SYSTEM, Message("user", "?" * 200)])


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(0, 9))
def test_what_is_kept_is_the_end_of_the_conversation(sizes: list[int], forgotten: int) -> None:
    messages = conversation(*sizes)
    found = fitted(messages, forgotten=forgotten)
    turns = turns_of(messages)
    kept = [message for turn in turns[found.forgotten :] for message in turn]
    assert found.ids == encode([SYSTEM, *kept])
    assert min(forgotten, len(turns) - 1) <= found.forgotten < len(turns)
    assert len(found.ids) <= 75 or found.forgotten == len(turns) - 1


def test_a_turn_is_a_question_and_what_answers_it() -> None:
    question, answer = Message("user", "q"), Message("assistant", "a")
    greeting = Message("assistant", "hello")
    assert turns_of([SYSTEM, greeting, question, answer, question]) == [
        [greeting], [question, answer], [question],
    ]  # fmt: skip
