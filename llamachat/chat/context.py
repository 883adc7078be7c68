"""When the context fills: whole oldest turns are left out, and it is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llamachat.chat.templates import Message

REPLY_SHARE = 4  # a quarter of the context is kept free for the reply
AFTER_TRIM = 0.75  # of what a prompt may fill: so that not every later turn trims and runs anew


@dataclass(frozen=True, slots=True)
class Fitted:
    """A prompt that fits, and how it was made to.

    Attributes:
        ids: the prompt.
        forgotten: turns left out, all the oldest of the conversation.
        dropped_tokens: tokens that this saved.
    """

    ids: list[int]
    forgotten: int
    dropped_tokens: int


def fit(
    messages: Sequence[Message],
    encode: Callable[[Sequence[Message]], list[int]],
    *,
    forgotten: int,
    ctx_size: int,
    max_new_tokens: int | None,
) -> Fitted:
    """The ids of a conversation, without as many of its oldest turns as the context demands.

    System messages and the last turn always stay; a prompt that is still too long is returned as
    it is. Turns that were `forgotten` before stay so.
    """
    turns = turns_of(messages)
    forgotten = max(0, min(forgotten, len(turns) - 1))

    def encoded() -> list[int]:
        return encode(without_oldest(messages, forgotten))

    ids = encoded()
    first_length = len(ids)
    reserve = min(max_new_tokens or ctx_size, ctx_size // REPLY_SHARE)
    limit = ctx_size - reserve
    if first_length > limit:
        while len(ids) > AFTER_TRIM * limit and forgotten < len(turns) - 1:
            forgotten += 1
            ids = encoded()
    return Fitted(ids, forgotten, first_length - len(ids))


def without_oldest(messages: Sequence[Message], n: int) -> list[Message]:
    """A conversation without its n oldest turns; system messages stay."""
    system = [message for message in messages if message.role == "system"]
    return [*system, *(message for turn in turns_of(messages)[n:] for message in turn)]


def turns_of(messages: Sequence[Message]) -> list[list[Message]]:
    """A conversation as turns: a question and what answers it. System messages are in none."""
    turns: list[list[Message]] = []
    for message in messages:
        if message.role == "user" or (message.role == "assistant" and not turns):
            turns.append([message])
        elif message.role == "assistant":
            turns[-1].append(message)
    return turns
