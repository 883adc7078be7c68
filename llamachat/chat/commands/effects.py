"""What a command works on, and what it asks the terminal to do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from llamachat.chat.events import Done, Event
from llamachat.chat.keeping import Keeper
from llamachat.chat.session import ChatSession
from llamachat.chat.specs import Spec
from llamachat.chat.spoken import Spoken


@dataclass(frozen=True, slots=True)
class Say:
    """Show lines to the user, `verbatim` if none of them may be wrapped at words."""

    text: str
    verbatim: bool = False


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


@dataclass(frozen=True, slots=True)
class Edit:
    """Let the user change a text in an editor; what comes of it, unless it stays as it is.

    Attributes:
        text: what there is.
        what: its name for people: "the question".
        then: makes the next effect of the new text.
    """

    text: str
    what: str
    then: Callable[[str], Answer | Say]


@dataclass(frozen=True, slots=True)
class Switch:
    """Go on with another model (None: the same), with these adapters."""

    model: str | None
    lora: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Copy:
    """Put a text on the clipboard, and say what it was."""

    text: str
    what: str


Effect: TypeAlias = "Say | Answer | Compare | Copy | Edit | Leave | Switch | Walk"


@dataclass(slots=True)
class Conversation:
    """A session and what the terminal knows about it.

    Attributes:
        session: who is talked to.
        title: one line about the model.
        last: how the last reply ended.
        used_tokens: of the context, after the last line was performed.
        lora: the adapters that the model has.
        attached: files that go before the next question.
        keeper: keeps it on disk, where that can be.
        markdown: whether replies are rendered as Markdown.
    """

    session: ChatSession
    title: str
    last: Done | None = field(default=None)
    used_tokens: int = field(default=0)
    lora: tuple[str, ...] = ()
    attached: tuple[str, ...] = ()
    keeper: Keeper | None = field(default=None)
    markdown: bool = field(default=True)


@dataclass(frozen=True, slots=True)
class Choices:
    """An argument that is one of some words.

    Attributes:
        words: which; more may be added later.
        after: by word, the argument that follows it.
        repeats: any number of them may follow each other.
    """

    words: Collection[str]
    after: Mapping[str, Argument] = field(default_factory=dict)
    repeats: bool = False


@dataclass(frozen=True, slots=True)
class FileName:
    """An argument that is a path, after `prefix`."""

    prefix: str = ""


@dataclass(frozen=True, slots=True)
class ModelName:
    """An argument that names a model: one of the catalog, of the config file, or on disk."""


@dataclass(frozen=True, slots=True)
class SessionName:
    """An argument that names a conversation that is kept, or its file."""


@dataclass(frozen=True, slots=True)
class BlockNumber:
    """An argument that numbers a block of code of the last reply."""


Argument: TypeAlias = Choices | FileName | ModelName | SessionName | BlockNumber


@dataclass(frozen=True, slots=True)
class Command:
    """One slash command.

    Attributes:
        usage: how it is written.
        help: what it does, in one line.
        perform: does it.
        argument: what may follow its name, to be completed.
        early: does the same while the model is not loaded yet; None if it needs the model.
        more: what /help says of it alone.
    """

    usage: str
    help: str
    perform: Callable[[Conversation, str], Effect]
    argument: Argument | None = None
    early: Callable[[str], Effect] | None = None
    more: str = ""
