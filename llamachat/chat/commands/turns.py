"""Commands that ask, answer anew, go on and take back."""

from __future__ import annotations

from pathlib import Path

from llamachat.chat.commands.effects import Answer, Command, Compare, Conversation, Effect, Say
from llamachat.chat.specs import DEFAULTS, parse_spec
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
        raise UsageError(f"/undo {argument}: expected a number of turns")
    gone = conversation.session.undo(int(argument or 1))
    turns = conversation.session.turns
    return Say(f"Took back {gone} turn(s); {turns} left." if gone else "Nothing to take back.")


def _system(conversation: Conversation, argument: str) -> Effect:
    if not argument:
        return Say(conversation.session.system or "(no system message)")
    if argument.startswith("@"):
        path = Path(argument[1:]).expanduser()
        try:
            argument = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: cannot be read as text: {error}") from error
    conversation.session.system = argument
    return Say("The system message is set; it holds from the next turn on.")


COMMANDS: dict[str, Command] = {
    "clear": Command("/clear", "forget the conversation, keep the system message", _clear),
    "regen": Command("/regen [seed N]", "answer the last question anew", _regen),
    "continue": Command("/continue", "go on with a reply that was cut", _continue),
    "compare": Command(
        "/compare [SPEC...]",
        "answer the last question in several ways: greedy, beam:4, top-p:0.9,seed=7...",
        _compare,
    ),
    "undo": Command("/undo [N]", "take back the last N turns", _undo),
    "system": Command("/system [TEXT|@FILE]", "show or set the system message", _system),
}
