"""When the context fills: whole oldest turns are left out, and it is said."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, cast, get_args

from llamachat.chat.templates import Message
from llamachat.errors import PromptTooLongError, UsageError

Overflow: TypeAlias = Literal["trim", "error", "summarize"]

UNBOUNDED = sys.maxsize  # tokens of a context whose size a server keeps to itself
REPLY_SHARE = 4  # a quarter of the context is kept free for the reply
AFTER_TRIM = 0.75  # of what a prompt may fill: so that not every later turn trims and runs anew
NOTE = "Summary of the conversation so far:\n"


@dataclass(frozen=True, slots=True)
class Fitted:
    """A prompt that fits, and how it was made to.

    Attributes:
        ids: the prompt.
        forgotten: turns left out, all the oldest of the conversation.
        dropped_tokens: tokens that this saved.
        note: what stands for turns that were left out.
    """

    ids: list[int]
    forgotten: int
    dropped_tokens: int
    note: str | None = None


def check_overflow(name: str) -> Overflow:
    """What to do when the context fills, by its name.

    Raises:
        UsageError: there is no such name.
    """
    if name not in get_args(Overflow):
        raise UsageError(f"overflow is {name!r}, expected one of {', '.join(get_args(Overflow))}")
    return cast("Overflow", name)


def fit(
    messages: Sequence[Message],
    encode: Callable[[Sequence[Message]], list[int]],
    *,
    forgotten: int,
    ctx_size: int,
    max_new_tokens: int | None,
    note: str | None = None,
    may_trim: bool = True,
) -> Fitted:
    """The ids of a conversation, without as many of its oldest turns as the context demands.

    System messages and the last turn always stay; a prompt that is still too long is returned as
    it is. Turns that were `forgotten` before stay so, and a note for them.

    Raises:
        PromptTooLongError: turns would have to go, and may not.
    """
    turns = turns_of(messages)
    forgotten = max(0, min(forgotten, len(turns) - 1))

    def encoded() -> list[int]:
        return encode(without_oldest(messages, forgotten, note))

    ids = encoded()
    first_length = len(ids)
    limit = prompt_limit(ctx_size, max_new_tokens)
    if first_length > limit:
        if not may_trim and forgotten < len(turns) - 1:
            raise PromptTooLongError(
                f"the context is full: the conversation has {first_length} tokens, "
                f"{limit} of {ctx_size} have room beside a reply",
                hint="/undo, /clear, or --overflow trim (/set overflow trim)",
            )
        while len(ids) > AFTER_TRIM * limit and forgotten < len(turns) - 1:
            forgotten += 1
            ids = encoded()
    return Fitted(ids, forgotten, first_length - len(ids), note)


def prompt_limit(ctx_size: int, max_new_tokens: int | None) -> int:
    """Tokens that a prompt may have, so that a reply has room."""
    return ctx_size - min(max_new_tokens or ctx_size, ctx_size // REPLY_SHARE)


def without_oldest(messages: Sequence[Message], n: int, note: str | None = None) -> list[Message]:
    """A conversation without its n oldest turns; system messages stay, and have the note."""
    system = [message for message in messages if message.role == "system"]
    rest = [message for turn in turns_of(messages)[n:] for message in turn]
    if note is None:
        return [*system, *rest]
    noted = replace(system[-1], content=f"{system[-1].content}\n\n{NOTE}{note}") if system else None
    return [*system[:-1], noted or Message("system", f"{NOTE}{note}"), *rest]


def turns_of(messages: Sequence[Message]) -> list[list[Message]]:
    """A conversation as turns: a question and what answers it. System messages are in none."""
    turns: list[list[Message]] = []
    for message in messages:
        if message.role == "user" or (message.role == "assistant" and not turns):
            turns.append([message])
        elif message.role == "assistant":
            turns[-1].append(message)
    return turns
