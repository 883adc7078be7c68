"""What a typed line means. A command returns an effect; the terminal performs it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from llamachat.chat.events import Done, Event
from llamachat.chat.options import PARSERS, parse_value, shown
from llamachat.chat.session import ChatSession
from llamachat.chat.specs import DEFAULTS, Spec, parse_spec
from llamachat.chat.spoken import Spoken, listing
from llamachat.engine.decoding import check_one_row
from llamachat.engine.probabilities import MOST
from llamachat.errors import UsageError


@dataclass(frozen=True, slots=True)
class Say:
    """Show lines to the user."""

    text: str


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


Effect: TypeAlias = Say | Answer | Compare | Leave | Walk


@dataclass(slots=True)
class Conversation:
    """A session and what the terminal knows about it.

    Attributes:
        session: who is talked to.
        title: one line about the model.
        last: how the last reply ended.
        used_tokens: of the context, after the last line was performed.
    """

    session: ChatSession
    title: str
    last: Done | None = field(default=None)
    used_tokens: int = field(default=0)


@dataclass(frozen=True, slots=True)
class Command:
    """One slash command."""

    usage: str
    help: str
    perform: Callable[[Conversation, str], Effect]


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


def _seed(conversation: Conversation, argument: str) -> Effect:
    return _set(conversation, f"seed {argument}")


def _stop(conversation: Conversation, argument: str) -> Effect:
    session = conversation.session
    if argument == "off":
        session.stop = session.template.stops
    elif argument:
        session.stop = tuple(dict.fromkeys((*session.stop, _string(argument))))
    shown = " ".join(json.dumps(stop, ensure_ascii=False) for stop in session.stop)
    return Say(f"stop = {shown or 'none'}")


def _string(argument: str) -> str:
    """Text as it is typed, or as a JSON string, which can hold newlines."""
    try:
        text = json.loads(argument) if argument.startswith('"') else argument
    except ValueError:
        return argument
    if not isinstance(text, str) or not text:
        raise UsageError(f"/stop {argument}: expected text")
    return text


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


def _set(conversation: Conversation, argument: str) -> Effect:
    key, _, value = argument.partition(" ")
    key, value = key.replace("-", "_"), value.strip()
    if key not in SETTINGS or not value:
        near = difflib.get_close_matches(key, SETTINGS, n=1)
        known = ", ".join(SETTINGS)
        hint = f"did you mean {near[0]}?" if near and key not in SETTINGS else f"keys: {known}"
        raise UsageError(f"/set {argument or 'needs KEY VALUE'}: not understood", hint=hint)
    kind = SETTINGS[key]
    session = conversation.session
    parsed = None if value == "default" else parse_value(f"/set {key}", value, kind)
    if key in BOUNDS:
        default, least = BOUNDS[key]
        if parsed is not None and parsed < least:
            raise UsageError(f"/set {key}: found {value}, expected {least} or more")
        number = default if parsed is None else parsed
        if key == "speculate":
            check_one_row(session.options.decoding(), draft=number or 0)
        setattr(session, key, number)
    else:
        options = session.options.saying(**{key: parsed})
        decoding = options.decoding(session.model.tokenizer)
        check_one_row(decoding, draft=session.speculate, logprobs=session.logprobs)
        session.options = options
    return Say(f"{key} = {value}")


def _strategy(conversation: Conversation, argument: str) -> Effect:
    if not argument:
        return Say(conversation.session.options.said.strategy or "(as the model suggests)")
    return _set(conversation, f"strategy {argument}")


def _probs(conversation: Conversation, argument: str) -> Effect:
    session = conversation.session
    if not argument:
        return Walk(_probable(conversation))
    k = int(argument) if argument.isdecimal() else 0
    if argument != "off" and not 1 <= k <= MOST:
        raise UsageError(f"/probs {argument}: expected 1 to {MOST}, or off")
    check_one_row(session.options.decoding(session.model.tokenizer), logprobs=k)
    session.logprobs = k
    if not k:
        return Say("Probabilities are off.")
    return Say(f"Each token comes with its probability and {k} alternatives; /probs shows them.")


def _probable(conversation: Conversation) -> Spoken:
    """The last reply, whose probabilities are known."""
    spoken = conversation.session.spoken
    if spoken is None or not spoken.has_probabilities:
        raise UsageError(
            "there is no reply with probabilities", hint="/probs 5 asks for those of what follows"
        )
    return spoken


def _show(conversation: Conversation, what: str) -> Effect:
    if what not in VIEWS:
        near = difflib.get_close_matches(what, VIEWS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(VIEWS)}"
        raise UsageError(f"/show {what or 'needs a name'}: not understood", hint=hint)
    return Say(VIEWS[what](conversation))


def _params(conversation: Conversation) -> str:
    session = conversation.session
    options = session.options
    values = {**options.values(), **options.beams()}
    rows = [(name, shown(value), origin) for name, (value, origin) in values.items()]
    seed = session.options.said.seed
    last = conversation.last
    drawn = f"{last.seed}" if last and last.seed is not None else "drawn"
    rows.append(("seed", drawn if seed is None else str(seed), "drawn" if seed is None else "you"))
    limit = session.max_new_tokens
    rows.append(("max_new_tokens", str(limit or "what is left"), "you" if limit else "built in"))
    for name in ("speculate", "stop_loops", "logprobs"):
        if said := getattr(session, name):
            rows.append((name, str(said), "you"))
    if session.stop:
        rows.append(("stop", json.dumps(session.stop, ensure_ascii=False), "you"))
    return "\n".join(f"{name:<22}{value:<14}  {origin}" for name, value, origin in rows)


def _context(conversation: Conversation) -> str:
    session = conversation.session
    used, size = len(session.prompt_ids), session.model.engine.ctx_size
    return f"{used} of {size} tokens in {session.turns} turn(s)"


def _stats(conversation: Conversation) -> str:
    done = conversation.last
    if done is None:
        return "No reply yet."
    return statistics(done)


def statistics(done: Done) -> str:
    """One line about how fast a reply came."""
    ran, timings = done.prompt_tokens - done.reused_tokens, done.timings
    parts = [f"{len(done.token_ids)} tokens"]
    if timings.decode_s > 0 and len(done.token_ids) > 1:
        parts.append(f"{(len(done.token_ids) - 1) / timings.decode_s:.1f} tok/s")
    parts.append(f"prompt {done.prompt_tokens} ({done.reused_tokens} reused)")
    if timings.prefill_s > 0 and ran:
        parts.append(f"prefill {ran / timings.prefill_s:.0f} tok/s")
    parts.append(f"first token after {timings.ttft_s:.2f} s")
    if done.seed is not None:
        parts.append(f"seed {done.seed}" + (f", attempt {done.attempt}" if done.attempt else ""))
    if (speculation := done.speculation) is not None:
        parts.append(f"{speculation.accepted} of {speculation.drafted} drafted tokens accepted")
    return " · ".join(parts)


VIEWS: dict[str, Callable[[Conversation], str]] = {
    "params": _params,
    "system": lambda c: c.session.system or "(no system message)",
    "template": lambda c: getattr(c.session.template, "source", c.session.template.name),
    "prompt": lambda c: c.session.prompt_text,
    "ids": lambda c: " ".join(map(str, c.session.prompt_ids)),
    "model": lambda c: c.title,
    "context": _context,
    "stats": _stats,
    "probs": lambda c: listing(_probable(c), c.session.model.tokenizer),
}

SETTINGS: dict[str, Callable[[str], Any]] = {
    **PARSERS,
    "max_new_tokens": int,
    "speculate": int,
    "stop_loops": int,
}

# Of the session, not of how it decodes: the default, and the least.
BOUNDS: dict[str, tuple[int | None, int]] = {
    "max_new_tokens": (None, 1),
    "speculate": (0, 0),
    "stop_loops": (0, 0),
}

COMMANDS: dict[str, Command] = {
    "help": Command("/help [CMD]", "what can be typed", _help),
    "exit": Command("/exit", "leave (Ctrl-D)", _exit),
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
    "set": Command("/set KEY VALUE", "change an option; the value 'default' takes it back", _set),
    "strategy": Command(
        "/strategy [NAME]", "show or set how it decodes: greedy, top-p:0.9, beam:4...", _strategy
    ),
    "seed": Command("/seed N", "the seed of every draw from now on", _seed),
    "stop": Command("/stop [STR|off]", "one more text that ends a reply, or none", _stop),
    "probs": Command(
        "/probs [K|off]",
        "colour replies by probability, with K alternatives; alone: walk and choose another",
        _probs,
    ),
    "show": Command("/show WHAT", ", ".join(VIEWS), _show),
}
