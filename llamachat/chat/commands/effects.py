"""What a command works on, and what it asks the terminal to do."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeAlias

from llamachat.chat.events import Done, Event
from llamachat.chat.session import ChatSession
from llamachat.chat.specs import Spec
from llamachat.chat.spoken import Spoken


@dataclass(frozen=True, slots=True)
class Say:
    """Show lines to the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Stream a reply."""

    events: Generator[Event, None, None]


@dataclass(frozen=True, slots=True)
class Leave:
    """End the conversation."""


@dataclass(frozen=True, slots=True)
class Compare:
    """Answer the last question in several ways, and let the user choose one."""

    specs: tuple[Spec, ...]


@dataclass(frozen=True, slots=True)
class Walk:
    """Let the user walk over the tokens of a reply, and go on from another choice."""

    spoken: Spoken


Effect: TypeAlias = Say | Answer | Compare | Leave | Walk


@dataclass(slots=True)
class Conversation:
    """A session and what the terminal knows about it.

    Attributes:
        session: who is talked to.
        title: one line about the model.
        last: how the last reply ended.
        used_tokens: of the context, after the last line was performed.
    """

    session: ChatSession
    title: str
    last: Done | None = field(default=None)
    used_tokens: int = field(default=0)


@dataclass(frozen=True, slots=True)
class Command:
    """One slash command."""

    usage: str
    help: str
    perform: Callable[[Conversation, str], Effect]
