"""Commands that go on with another model, or another form of it."""

from __future__ import annotations

from llamachat.chat.commands.effects import (
    Command,
    Conversation,
    Effect,
    FileName,
    ModelName,
    Say,
    Switch,
)
from llamachat.chat.files import words
from llamachat.errors import UsageError


def _model(conversation: Conversation, argument: str) -> Effect:
    if not argument:
        return Say(conversation.title)
    names = words(argument)
    if len(names) != 1:
        raise UsageError(f"/model {argument}: expected one model")
    return Switch(names[0])


def _lora(conversation: Conversation, argument: str) -> Effect:
    if not argument:
        return Say("\n".join(conversation.lora) or "(no adapters)")
    if argument == "off" and not conversation.lora:
        raise UsageError("the model has no adapters")
    return Switch(None, () if argument == "off" else tuple(words(argument)))


COMMANDS: dict[str, Command] = {
    "model": Command(
        "/model [NAME]",
        "show the model, or go on with another one",
        _model,
        ModelName(),
        more="The conversation stays, written anew in that model's template; adapters, --template "
        "and --revision\nwere the former one's. If it cannot be loaded, the former one stays.",
    ),
    "lora": Command(
        "/lora [PATH[:SCALE]...|off]",
        "show, set or remove the model's adapters",
        _lora,
        FileName(),
        more="The model is loaded anew, with these adapters and no others; the conversation stays.",
    ),
}
