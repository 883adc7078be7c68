"""Layouts of conversations: what stands before, between and after what is said.

They know no tokenizer: where a special token stands, a `Special` says which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from llamachat.chat.templates import Message
from llamachat.errors import UsageError


@dataclass(frozen=True, slots=True)
class Special:
    """A special token by its text; BOS and EOS are whatever the tokenizer calls so."""

    text: str


BOS, EOS = Special("BOS"), Special("EOS")
Part: TypeAlias = str | Special | tuple[int, ...]


class Layout(Protocol):
    """How a family of models writes conversations."""

    def parts(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> Iterator[Part]:
        """Literals, special tokens and contents in order.

        Raises:
            UsageError: the turns are not in an order that the layout has a place for.
        """
        ...


@dataclass(frozen=True, slots=True)
class Roles:
    """Every message alone, under its role.

    Attributes:
        before: what introduces a message, with {role}.
        after: what ends it.
        system: what a system message is written as, with {}.
        default_system: written where the conversation has none; None: nothing is.
    """

    before: tuple[Part, ...]
    after: tuple[Part, ...]
    system: str = "{}"
    default_system: str | None = None

    def parts(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> Iterator[Part]:
        """See `Layout.parts`."""
        if self.default_system is not None and not (messages and messages[0].role == "system"):
            messages = [Message("system", self.default_system), *messages]
        for message in messages:
            yield from self._before(message.role)
            if message.role == "system":
                yield self.system.format(message.content.strip())
            else:
                yield _content(message)
            yield from self.after
        if add_generation_prompt:
            yield from self._before("assistant")

    def _before(self, role: str) -> Iterator[Part]:
        for part in self.before:
            yield part.format(role=role) if isinstance(part, str) else part


@dataclass(frozen=True, slots=True)
class Rounds:
    """Questions and replies in turns.

    Attributes:
        before: what introduces a question, with {n} for the number of its round.
        between: what stands between a question and its reply, and ends a prompt.
        after: what ends a round.
        lead: what stands before a reply that was written; one that was generated has its own.
        opening: what comes first.
        system: what a system message is written as, with {}.
        default_system: written where the conversation has none; None: nothing is.
        system_in_question: the system message is part of the first question.
        first_round: the number of the first round.
        bare_first: a question without history is all there is.
        closing: what ends a prompt, whatever the rounds.
        replies_as_text: a generated reply is read anew as text: it was written where a text begins,
            and no cache outlives its turn.
    """

    before: tuple[Part, ...]
    between: str
    after: tuple[Part, ...]
    lead: str = ""
    opening: tuple[Part, ...] = ()
    system: str = "{}"
    default_system: str | None = None
    system_in_question: bool = False
    first_round: int = 1
    bare_first: bool = False
    closing: tuple[Part, ...] = ()
    replies_as_text: bool = False

    def parts(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> Iterator[Part]:
        """See `Layout.parts`."""
        system = self.default_system
        if messages and messages[0].role == "system":
            system, messages = messages[0].content.strip(), messages[1:]
        _check_turns(messages)
        introduction = "" if system is None else self.system.format(system)
        yield from self.opening
        if not self.system_in_question:
            yield introduction
            introduction = ""
        bare = self.bare_first and len(messages) == 1
        for i, message in enumerate(messages):
            if message.role == "assistant":
                yield self.between
                as_text = message.ids is None or self.replies_as_text
                yield self.lead if as_text else ""
                yield message.content.strip() if as_text else _content(message)
                yield from self.after
                continue
            if not bare:
                yield from self._before(i // 2)
            yield f"{introduction if i == 0 else ''}{message.content.strip()}".strip()
        if add_generation_prompt and len(messages) % 2 and not bare:
            yield self.between
        yield from self.closing if add_generation_prompt else ()

    def _before(self, index: int) -> Iterator[Part]:
        for part in self.before:
            yield part.format(n=self.first_round + index) if isinstance(part, str) else part


def _content(message: Message) -> Part:
    return message.content.strip() if message.ids is None else message.ids


def _check_turns(messages: Sequence[Message]) -> None:
    for i, message in enumerate(messages):
        expected = ("user", "assistant")[i % 2]
        if message.role != expected:
            raise UsageError(
                f"turn {i + 1} is of role {message.role}, the template takes {expected} there"
            )
