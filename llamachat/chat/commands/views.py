"""Commands that show something and change nothing."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable

from llamachat.chat.commands.effects import Choices, Command, Conversation, Effect, Say, Walk
from llamachat.chat.context import UNBOUNDED
from llamachat.chat.events import Done
from llamachat.chat.options import shown
from llamachat.chat.spoken import Spoken, listing
from llamachat.chat.usage import counted_turns
from llamachat.engine.decoding import check_one_row
from llamachat.engine.probabilities import MOST
from llamachat.errors import UsageError


def _show(conversation: Conversation, what: str) -> Effect:
    if what not in VIEWS:
        near = difflib.get_close_matches(what, VIEWS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(VIEWS)}"
        raise UsageError(f"/show {what or 'needs a name'}: not understood", hint=hint)
    return Say(VIEWS[what](conversation), verbatim=what in VERBATIM)


def _params(conversation: Conversation) -> str:
    session = conversation.session
    options = session.options
    values = {**options.values(), **options.beams()}
    rows = [(name, shown(value), origin) for name, (value, origin) in values.items()]
    seed = session.options.said.seed
    last = conversation.last
    drawn = f"{last.seed}" if last and last.seed is not None else "drawn"
    by = options.origin
    rows.append(("seed", drawn, "drawn") if seed is None else ("seed", str(seed), by("seed")))
    limit = session.max_new_tokens
    told = by("max_new_tokens") if limit else "built in"
    rows.append(("max_new_tokens", str(limit or "what is left"), told))
    for name in ("speculate", "stop_loops", "logprobs"):
        if said := getattr(session, name):
            rows.append((name, str(said), by(name)))
    if session.overflow != "trim":
        rows.append(("overflow", session.overflow, by("overflow")))
    if session.stop:
        rows.append(("stop", json.dumps(session.stop, ensure_ascii=False), by("stop")))
    return "\n".join(f"{name:<22}{value:<14}  {origin}" for name, value, origin in rows)


def _context(conversation: Conversation) -> str:
    session = conversation.session
    used, size = len(session.prompt_ids), session.model.engine.ctx_size
    whole = f" of {size:,}" if size < UNBOUNDED else ""
    return f"{used:,}{whole} tokens in {counted_turns(session.turns)}"


def _stats(conversation: Conversation) -> str:
    done = conversation.last
    if done is None:
        return "No reply yet."
    return statistics(done)


def statistics(done: Done) -> str:
    """One line about how fast a reply came."""
    ran, timings = done.prompt_tokens - done.reused_tokens, done.timings
    parts = [f"{done.completion_tokens} tokens"]
    if timings.decode_s > 0 and done.completion_tokens > 1:
        parts.append(f"{(done.completion_tokens - 1) / timings.decode_s:.1f} tok/s")
    parts.append(f"prompt {done.prompt_tokens} ({done.reused_tokens} reused)")
    if timings.prefill_s > 0 and ran:
        parts.append(f"prefill {ran / timings.prefill_s:.0f} tok/s")
    parts.append(f"first token after {timings.ttft_s:.2f} s")
    if done.seed is not None:
        parts.append(f"seed {done.seed}" + (f", attempt {done.attempt}" if done.attempt else ""))
    if (speculation := done.speculation) is not None:
        parts.append(f"{speculation.accepted} of {speculation.drafted} drafted tokens accepted")
    return " · ".join(parts)


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

VERBATIM = ("prompt", "system", "template")

COMMANDS: dict[str, Command] = {
    "probs": Command(
        "/probs [K|off]",
        "colour replies by probability, with K alternatives; alone: walk and choose another",
        _probs,
        Choices(("off",)),
    ),
    "show": Command("/show WHAT", ", ".join(VIEWS), _show, Choices(VIEWS)),
}
