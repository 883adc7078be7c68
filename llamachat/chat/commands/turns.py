"""Commands that ask, answer anew, go on and take back."""

from __future__ import annotations

from pathlib import Path

from llamachat.chat.commands.effects import (
    Answer,
    Choices,
    Command,
    Compare,
    Conversation,
    Effect,
    FileName,
    Say,
)
from llamachat.chat.files import read_text
from llamachat.chat.options import STRATEGIES
from llamachat.chat.specs import DEFAULT, DEFAULTS, parse_spec
from llamachat.chat.usage import counted_turns
from llamachat.errors import UsageError


def _clear(conversation: Conversation, _: str) -> Effect:
    conversation.session.clear()
    conversation.last = None
    return Say("The conversation begins anew.")


def _regen(conversation: Conversation, argument: str) -> Effect:
    words = argument.split()
    if not words:
        return Answer(conversation.session.regenerate())
    if len(words) == 2 and words[0] == "seed" and words[1].isdecimal():
        return Answer(conversation.session.regenerate(seed=int(words[1])))
    raise UsageError(f"/regen {argument}: not understood", hint="write /regen or /regen seed 7")


def _continue(conversation: Conversation, _: str) -> Effect:
    return Answer(conversation.session.continue_())


def _compare(conversation: Conversation, argument: str) -> Effect:
    specs = tuple(map(parse_spec, argument.split() or DEFAULTS))
    for spec in specs:
        spec.options(conversation.session.options).decoding(conversation.session.model.tokenizer)
    conversation.session.asking()
    return Compare(specs)


def _undo(conversation: Conversation, argument: str) -> Effect:
    if argument and not (argument.isdecimal() and int(argument)):
        raise UsageError(f"/undo {argument}: expected a number of changes")
    session = conversation.session
    gone = session.changes[-int(argument or 1) :]
    if not session.undo(len(gone)):
        return Say("Nothing to take back.")
    left = counted_turns(session.turns)
    return Say(f"Took back {', '.join(reversed(gone))}; {left} left.")


def _system(conversation: Conversation, argument: str) -> Effect:
    if not argument:
        return Say(conversation.session.system or "(no system message)")
    said = ["The system message is set; it holds from the next turn on."]
    if argument.startswith("@"):
        problems: list[str] = []
        argument = read_text(Path(argument[1:]), problems.append).strip()
        said = [*problems, *said]
    conversation.session.system = argument
    return Say("\n".join(said))


COMMANDS: dict[str, Command] = {
    "clear": Command("/clear", "forget the conversation, keep the system message", _clear),
    "regen": Command(
        "/regen [seed N]", "answer the last question anew", _regen, Choices(("seed",))
    ),
    "continue": Command("/continue", "go on with a reply that was cut", _continue),
    "compare": Command(
        "/compare [SPEC...]",
        "answer the last question in several ways: greedy, beam:4, top-p:0.9,seed=7...",
        _compare,
        Choices((DEFAULT, *STRATEGIES), repeats=True),
    ),
    "undo": Command(
        "/undo [N]",
        "take back the last turn or change, or the last N",
        _undo,
        more="A turn goes with its reply. After /regen, /continue, /edit, /edit-reply, /clear, "
        "/load, /system,\na branch or a choice of /compare, what was before it is back.",
    ),
    "system": Command(
        "/system [TEXT|@FILE]", "show or set the system message", _system, FileName("@")
    ),
}
