"""What a conversation is, and what it was before each change: changes can be taken back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llamachat.chat.context import turns_of
from llamachat.chat.record import Part
from llamachat.chat.spoken import Spoken
from llamachat.chat.templates import Message


@dataclass(frozen=True, slots=True)
class State:
    """A conversation at one moment.

    Attributes:
        messages: the system message first.
        forgotten: the oldest turns that the context had no room for.
        note: what these said, in short, if they were summarized.
        spoken: the last reply, after what it was before branches.
        attempt: which draw it is.
    """

    messages: tuple[Message, ...] = ()
    forgotten: int = 0
    note: str | None = None
    spoken: tuple[Spoken, ...] = ()
    attempt: int = 0

    @property
    def system(self) -> str | None:
        """The system message."""
        has_one = bool(self.messages) and self.messages[0].role == "system"
        return self.messages[0].content if has_one else None

    def with_system(self, text: str | None) -> State:
        """With another system message, or none."""
        turns = self.messages[self.system is not None :]
        return replace(self, messages=((Message("system", text), *turns) if text else turns))

    def without_ids(self) -> State:
        """As another model would be told it: text alone, and nothing forgotten."""
        return State(tuple(replace(message, ids=None) for message in self.messages))


@dataclass(frozen=True, slots=True)
class Change:
    """What changed a conversation, in a word or two, and what it was before."""

    name: str
    before: State


class History:
    """A conversation and its changes.

    Attributes:
        now: what the conversation is.
        changes: what made it so, the oldest first.
    """

    def __init__(self, messages: Sequence[Message] = ()) -> None:
        """Begin with messages, as if their turns had just been asked."""
        self.now = State(tuple(messages))
        self.changes: list[Change] = []
        length = len(messages) - sum(map(len, turns_of(messages)))
        for number, turn in enumerate(turns_of(messages), 1):
            self.changes.append(Change(f"turn {number}", State(tuple(messages[:length]))))
            length += len(turn)

    def change(self, name: str, state: State) -> None:
        """The conversation is `state` from now on."""
        self.changes.append(Change(name, self.now))
        self.now = state

    def undo(self, n: int) -> int:
        """Take back the last n changes; returns how many there were to take back."""
        gone = self.changes[max(0, len(self.changes) - n) :]
        if gone:
            del self.changes[-len(gone) :]
            self.now = gone[0].before
        return len(gone)

    def forget_ids(self) -> None:
        """No message, now or before, is the ids that it was generated as."""
        self.now = self.now.without_ids()
        self.changes = [replace(it, before=it.before.without_ids()) for it in self.changes]


def last_part(messages: Sequence[Message]) -> Part | None:
    """How the end of the last reply was made, of those of which that is known."""
    parts = [m.record.parts[-1] for m in messages if m.record and m.record.parts]
    return parts[-1] if parts else None


def resumed(messages: Sequence[Message]) -> State:
    """A conversation that was recorded, as its last reply left it."""
    last = last_part(messages)
    if last is None:
        return State(tuple(messages))
    return State(tuple(messages), last.forgotten, last.note, (), last.attempt)
