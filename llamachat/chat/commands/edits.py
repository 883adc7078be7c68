"""Commands for what is written elsewhere: in an editor, in files."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

from llamachat.chat.commands.effects import (
    Answer,
    Command,
    Conversation,
    Edit,
    Effect,
    FileName,
    Say,
)
from llamachat.chat.context import UNBOUNDED
from llamachat.chat.events import Event
from llamachat.chat.files import fenced, matching, read_text, words
from llamachat.errors import PromptTooLongError, UsageError

MOST_BYTES_PER_TOKEN = 64  # of text: a file with more for each token of the context is not read


def send(conversation: Conversation, question: str) -> Generator[Event, None, None]:
    """Ask, after the files that were read for it; they stay until there is an answer."""
    session, before = conversation.session, conversation.session.messages
    events = session.send("\n\n".join((*conversation.attached, question)))

    def following() -> Generator[Event, None, None]:
        try:
            yield from events
        finally:
            if session.messages != before:
                conversation.attached = ()

    return following() if conversation.attached else events


def _edit(conversation: Conversation, _: str) -> Effect:
    session = conversation.session
    asked = [message.content for message in session.messages if message.role == "user"]
    if not asked:
        raise UsageError("there is no question to edit")
    return Edit(asked[-1], "the question", lambda text: Answer(session.edit(text)))


def _edit_reply(conversation: Conversation, _: str) -> Effect:
    session = conversation.session
    if not session.messages or session.messages[-1].role != "assistant":
        raise UsageError("there is no reply to edit")

    def changed(text: str) -> Say:
        session.edit_reply(text)
        return Say("The reply is changed; /continue goes on from it.")

    return Edit(session.messages[-1].content, "the reply", changed)


def _read(conversation: Conversation, argument: str) -> Effect:
    if argument == "off":
        conversation.attached = ()
        return Say("No file goes before the next message.")
    said: list[str] = []
    texts = list(conversation.attached)
    for path in [path for pattern in words(argument) for path in matching(pattern)]:
        _check_size(path, conversation)
        texts.append(fenced(path.name, read_text(path, said.append)))
    if not texts:
        raise UsageError("/read needs FILE", hint="/read notes.txt src/*.py")
    said.append(_sized(texts, conversation))
    conversation.attached = tuple(texts)
    return Say("\n".join(said))


def _check_size(path: Path, conversation: Conversation) -> None:
    """Refuse what cannot fit before it is read."""
    size, ctx_size = path.stat().st_size, conversation.session.model.engine.ctx_size
    if size > MOST_BYTES_PER_TOKEN * ctx_size:
        raise PromptTooLongError(f"{path}: {size:,} bytes; the context has {ctx_size:,} tokens")


def _sized(texts: list[str], conversation: Conversation) -> str:
    """What the files take of the context.

    Raises:
        PromptTooLongError: they do not fit, even alone.
    """
    session = conversation.session
    ctx_size, tokenizer = session.model.engine.ctx_size, session.model.tokenizer
    tokens = sum(len(tokenizer.encode(f"{text}\n\n")) for text in texts)
    system = len(tokenizer.encode(session.system or ""))
    files = f"{len(texts)} file{'s' * (len(texts) != 1)}: {tokens:,} tokens"
    if tokens + system >= ctx_size:
        beside = f" beside {system:,} of the system message" if system else ""
        raise PromptTooLongError(
            f"{files}{beside}; the context has {ctx_size:,}",
            hint="read less, or start with a larger --ctx-size",
        )
    free = ctx_size - len(session.prompt_ids)
    full = "" if tokens < free else ": the oldest turns will not fit beside them"
    told = "they go before your next message (/read off drops them)"
    left = f", {max(0, free):,} are free" if ctx_size < UNBOUNDED else ""
    return f"{files}{left}{full}; {told}."


COMMANDS: dict[str, Command] = {
    "edit": Command(
        "/edit",
        "change the last question in your editor, and ask it anew",
        _edit,
        more="The editor is $VISUAL or $EDITOR. Nothing happens where the text stays as it was, "
        "or is empty.\n/undo brings the former question and its reply back.",
    ),
    "edit-reply": Command(
        "/edit-reply",
        "change the last reply in your editor",
        _edit_reply,
        more="The model takes it for what it said; nothing is generated. /undo brings the former "
        "one back.",
    ),
    "read": Command(
        "/read FILE...|off",
        "files and globs that go before your next message, named",
        _read,
        FileName(),
        more="/read notes.txt 'my report.md' src/**/*.py, and then the question about them. Each "
        "file is\nfenced under its name, as -f does. /read off leaves them out again.",
    ),
}
