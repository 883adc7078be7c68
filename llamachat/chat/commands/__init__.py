"""What a typed line means. A command returns an effect; the terminal performs it."""

from __future__ import annotations

import difflib

from llamachat.chat.commands import turns, values, views
from llamachat.chat.commands.effects import (
    Answer,
    Command,
    Compare,
    Conversation,
    Effect,
    Leave,
    Say,
    Walk,
)
from llamachat.chat.commands.values import SETTINGS
from llamachat.chat.commands.views import VIEWS, statistics
from llamachat.errors import UsageError

__all__ = [
    "COMMANDS",
    "SETTINGS",
    "VIEWS",
    "Answer",
    "Command",
    "Compare",
    "Conversation",
    "Effect",
    "Leave",
    "Say",
    "Walk",
    "interpret",
    "statistics",
]


def interpret(line: str, conversation: Conversation) -> Effect:
    """A typed line: a command, or something to ask. `//text` asks "/text"; \""" may enclose it.

    Raises:
        UsageError: no such command (with the nearest name), or its arguments are wrong.
    """
    if not line.startswith("/") or line.startswith("//"):
        question = _unquoted(line.removeprefix("/"))
        if not question.strip():
            raise UsageError("there is nothing to ask between the quotes")
        return Answer(conversation.session.send(question))
    name, *argument = line[1:].split(maxsplit=1) if line[1:2].strip() else [""]
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UsageError(
            f"/{name}: no such command",
            hint=f"did you mean /{near[0]}?" if near else "/help lists them; // sends a slash",
        )
    return command.perform(conversation, "".join(argument).strip())


def _unquoted(line: str) -> str:
    """What stands between triple quotes, if they enclose the whole line."""
    bare = line.strip()
    enclosed = len(bare) >= 6 and bare.startswith('"""') and bare.endswith('"""')
    return bare[3:-3].strip("\n") if enclosed else line


def _help(_: Conversation, name: str) -> Effect:
    command = COMMANDS.get(name.removeprefix("/"))
    if name and command is None:
        raise UsageError(f"/help {name}: no such command", hint="/help lists them")
    shown = [command] if command else list(COMMANDS.values())
    width = max(len(c.usage) for c in shown)
    return Say("\n".join(f"{c.usage:<{width}}  {c.help}" for c in shown))


def _exit(_: Conversation, __: str) -> Effect:
    return Leave()


COMMANDS: dict[str, Command] = {
    "help": Command("/help [CMD]", "what can be typed", _help),
    "exit": Command("/exit", "leave (Ctrl-D)", _exit),
    **turns.COMMANDS,
    **values.COMMANDS,
    **views.COMMANDS,
}
