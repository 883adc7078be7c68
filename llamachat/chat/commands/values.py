"""Commands that change how replies are drawn."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection
from typing import Any

from llamachat.chat.commands.effects import Choices, Command, Conversation, Effect, Say
from llamachat.chat.context import check_overflow
from llamachat.chat.options import PARSERS, STRATEGIES, parse_value
from llamachat.chat.sources import saying
from llamachat.engine.decoding import check_one_row
from llamachat.engine.parameters import ORDERS
from llamachat.errors import UsageError

SETTINGS: dict[str, Callable[[str], Any]] = {
    **PARSERS,
    "max_new_tokens": int,
    "speculate": int,
    "stop_loops": int,
    "overflow": check_overflow,
}

# Of the session, not of how it decodes: the default, and the least.
BOUNDS: dict[str, tuple[int | None, int]] = {
    "max_new_tokens": (None, 1),
    "speculate": (0, 0),
    "stop_loops": (0, 0),
}

VALUES: dict[str, Collection[str]] = {  # of the settings whose values are words
    "strategy": STRATEGIES,
    "early_stopping": ("true", "false", "never"),
    "samplers": tuple(ORDERS),
}


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
    if key == "overflow":
        session.overflow = parsed or "trim"
    elif key in BOUNDS:
        default, least = BOUNDS[key]
        if parsed is not None and parsed < least:
            raise UsageError(f"/set {key}: found {value}, expected {least} or more")
        number = default if parsed is None else parsed
        if key == "speculate":
            check_one_row(session.options.decoding(), draft=number or 0)
        setattr(session, key, number)
        session.options = session.options.by_you(key)
    else:
        options = saying(session.options, **{key: parsed})
        decoding = options.decoding(session.model.tokenizer)
        check_one_row(decoding, draft=session.speculate, logprobs=session.logprobs)
        session.options = options
    return Say(f"{key} = {value}")


def _strategy(conversation: Conversation, argument: str) -> Effect:
    if not argument:
        return Say(conversation.session.options.said.strategy or "(as the model suggests)")
    return _set(conversation, f"strategy {argument}")


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


COMMANDS: dict[str, Command] = {
    "set": Command(
        "/set KEY VALUE",
        "change an option; the value 'default' takes it back",
        _set,
        Choices(
            SETTINGS, after={key: Choices((*VALUES.get(key, ()), "default")) for key in SETTINGS}
        ),
    ),
    "strategy": Command(
        "/strategy [NAME]",
        "show or set how it decodes: greedy, top-p:0.9, beam:4...",
        _strategy,
        Choices(STRATEGIES),
    ),
    "seed": Command("/seed N", "the seed of every draw from now on", _seed),
    "stop": Command(
        "/stop [STR|off]", "one more text that ends a reply, or none", _stop, Choices(("off",))
    ),
}
