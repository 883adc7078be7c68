"""Commands that keep the conversation, and bring others back."""

from __future__ import annotations

from pathlib import Path

from llamachat.chat import keeping, saved
from llamachat.chat.commands.effects import Choices, Command, Conversation, Effect, Say, SessionName
from llamachat.chat.export import export
from llamachat.chat.keeping import Keeper
from llamachat.chat.usage import counted_turns
from llamachat.errors import UsageError


def _keeper(conversation: Conversation) -> Keeper:
    if conversation.keeper is None:
        raise UsageError("this conversation is not kept")
    return conversation.keeper


def _save(conversation: Conversation, argument: str) -> Effect:
    return Say(f"Saved in {_keeper(conversation).save_as(argument or None)}")


def _load(conversation: Conversation, argument: str) -> Effect:
    keeper = _keeper(conversation)
    if not argument:
        raise UsageError("/load needs a name or a file", hint="/sessions lists them")
    path = saved.path_of(argument)
    if path == keeper.path:
        raise UsageError(f"{path.stem} is this conversation")
    if not path.exists():
        raise UsageError(f"{path}: there is no such conversation", hint="/sessions lists them")
    found = keeping.find(argument)
    keeper.keep()
    keeper.take(found)
    conversation.last = None
    return Say(f"{path.stem}: {counted_turns(conversation.session.turns)}")


def _sessions(_: Conversation, __: str) -> Effect:
    found = saved.listed()
    if not found:
        return Say("No conversation is saved yet.")
    name, model = (max(len(getattr(it, key)) for it in found) for key in ("name", "model"))
    return Say(
        "\n".join(f"{it.name:<{name}}  {it.when}  {it.model:<{model}}  {it.title}" for it in found)
    )


def _export(conversation: Conversation, argument: str) -> Effect:
    form, _, name = argument.partition(" ")
    text = export(conversation.session.messages, form)
    keeper = conversation.keeper
    stem = keeper.path.stem if keeper and keeper.path else "conversation"
    path = Path(name.strip() or f"{stem}.{form}").expanduser()
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    return Say(f"Written to {path}")


COMMANDS: dict[str, Command] = {
    "save": Command("/save [FILE]", "keep the conversation, from now on under this name", _save),
    "load": Command("/load FILE", "go on with a conversation that was kept", _load, SessionName()),
    "sessions": Command("/sessions", "the conversations that are kept", _sessions),
    "export": Command(
        "/export md|json [FILE]",
        "write the conversation for others",
        _export,
        Choices(("md", "json")),
    ),
}
