"""Where the tokens of a context went."""

from __future__ import annotations

from dataclasses import dataclass

from llamachat.chat.context import turns_of
from llamachat.chat.session import ChatSession
from llamachat.chat.templates import Message


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn that is in the prompt: how it begins, and the tokens of question and reply."""

    number: int
    text: str
    question: int
    reply: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the prompt as it would be run now.

    Attributes:
        ctx_size: of the context.
        used: of the prompt.
        system: of the system message.
        summary: of what stands for turns that were left out.
        turns: those that are in the prompt.
        forgotten: turns that are not in it.
        forgotten_tokens: what these said.
    """

    ctx_size: int
    used: int
    system: int
    summary: int
    turns: tuple[Turn, ...]
    forgotten: int
    forgotten_tokens: int

    @property
    def free(self) -> int:
        """Tokens that are left."""
        return max(0, self.ctx_size - self.used)

    @property
    def template(self) -> int:
        """What is not the messages'."""
        said = sum(turn.question + turn.reply for turn in self.turns)
        return max(0, self.used - self.system - self.summary - said)


def counted_turns(n: int) -> str:
    """Their number, for people."""
    return f"{n or 'no'} turn{'s' * (n != 1)}"


def usage(session: ChatSession) -> Usage:
    """Count a session's prompt; messages alone, so neighbours that share a token count it twice."""
    encode = session.model.tokenizer.encode

    def size(message: Message) -> int:
        return len(encode(message.content) if message.ids is None else message.ids)

    def counted(number: int, turn: list[Message]) -> Turn:
        asked = sum(size(message) for message in turn if message.role == "user")
        return Turn(number, turn[0].content, asked, sum(map(size, turn)) - asked)

    turns = [counted(number, turn) for number, turn in enumerate(turns_of(session.messages), 1)]
    gone = turns[: session.forgotten]
    return Usage(
        ctx_size=session.model.engine.ctx_size,
        used=len(session.prompt_ids),
        system=len(encode(session.system or "")),
        summary=len(encode(session.note or "")),
        turns=tuple(turns[session.forgotten :]),
        forgotten=len(gone),
        forgotten_tokens=sum(turn.question + turn.reply for turn in gone),
    )
