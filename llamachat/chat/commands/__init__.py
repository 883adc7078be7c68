"""What a typed line means. A command returns an effect; the terminal performs it."""

from __future__ import annotations

import difflib

from llamachat.chat.commands import context, edits, files, models, replies, turns, values, views
from llamachat.chat.commands.effects import (
    Answer,
    Choices,
    Command,
    Compare,
    Conversation,
    Copy,
    Edit,
    Effect,
    FileName,
    Leave,
    ModelName,
    Say,
    Switch,
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
    "Choices",
    "Command",
    "Compare",
    "Conversation",
    "Copy",
    "Edit",
    "Effect",
    "FileName",
    "Leave",
    "ModelName",
    "Say",
    "Switch",
    "Walk",
    "as_typed",
    "interpret",
    "interpret_early",
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
        return Answer(edits.send(conversation, question))
    command, argument = _command(line)
    return command.perform(conversation, argument)


def interpret_early(line: str) -> Effect | None:
    """A line that is typed while the model is not loaded yet; None: it has to wait for that.

    Raises:
        UsageError: no such command, or its arguments are wrong.
    """
    if not line.startswith("/") or line.startswith("//"):
        return None
    command, argument = _command(line)
    return command.early(argument) if command.early else None


def as_typed(question: str) -> str:
    """The line that asks this question, whatever it begins with."""
    if question.lstrip().startswith('"""'):
        return f'"""\n{question}\n"""'
    return f"/{question}" if question.startswith("/") else question


def _command(line: str) -> tuple[Command, str]:
    name, *argument = line[1:].split(maxsplit=1) if line[1:2].strip() else [""]
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UsageError(
            f"/{name}: no such command",
            hint=f"did you mean /{near[0]}?" if near else "/help lists them; // sends a slash",
        )
    return command, "".join(argument).strip()


def _unquoted(line: str) -> str:
    """What stands between triple quotes, if they enclose the whole line."""
    bare = line.strip()
    enclosed = len(bare) >= 6 and bare.startswith('"""') and bare.endswith('"""')
    return bare[3:-3].strip("\n") if enclosed else line


def _help(name: str) -> Effect:
    command = COMMANDS.get(name.removeprefix("/"))
    if name and command is None:
        raise UsageError(f"/help {name}: no such command", hint="/help lists them")
    if command is not None:
        return Say("\n".join(filter(None, (f"{command.usage}  {command.help}", command.more))))
    shown = COMMANDS.values()
    width = max(len(c.usage) for c in shown)
    return Say("\n".join(f"{c.usage:<{width}}  {c.help}" for c in shown))


COMMANDS: dict[str, Command] = {}
COMMANDS |= {
    "help": Command(
        "/help [CMD]",
        "what can be typed",
        lambda _, name: _help(name),
        Choices(COMMANDS.keys()),
        _help,
    ),
    "exit": Command("/exit", "leave (Ctrl-D)", lambda _, __: Leave(), early=lambda _: Leave()),
    **turns.COMMANDS,
    **edits.COMMANDS,
    **context.COMMANDS,
    **models.COMMANDS,
    **replies.COMMANDS,
    **values.COMMANDS,
    **views.COMMANDS,
    **files.COMMANDS,
}
