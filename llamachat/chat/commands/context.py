"""`/context`: where the tokens of the context went."""

from __future__ import annotations

from llamachat.chat.commands.effects import Command, Conversation, Effect, Say
from llamachat.chat.context import UNBOUNDED
from llamachat.chat.usage import Usage, usage

BAR, WORDS = 10, 28  # columns of a bar, and of what a turn begins with


def _context(conversation: Conversation, _: str) -> Effect:
    return Say(table(usage(conversation.session)))


def table(found: Usage) -> str:
    """A line for each part of the context, with a bar that is full where the part fills it."""
    is_known = found.ctx_size < UNBOUNDED
    size = found.ctx_size if is_known else max(1, found.used)
    lines = [f"{found.used:,} of {size:,} tokens ({found.used / size:.0%})"]
    if not is_known:
        lines = [f"{found.used:,} tokens; how many there may be the server does not tell"]
    rows: list[tuple[str, int, str]] = [("system", found.system, "")] if found.system else []
    if found.forgotten:
        told = f"{found.forgotten_tokens:,} tokens that are left out"
        if found.summary:
            told += ", summarized"
        rows.append((f"turns 1-{found.forgotten}", found.summary, told))
    for turn in found.turns:
        text = " ".join(turn.text.split())
        short = text if len(text) <= WORDS else f"{text[: WORDS - 1]}…"
        told = f"{turn.question:,} + {turn.reply:,}  {short}"
        rows.append((f"turn {turn.number}", turn.question + turn.reply, told))
    rows.append(("template", found.template, ""))
    if is_known:
        rows.append(("free", found.free, ""))
    for name, tokens, told in rows:
        filled = min(BAR, -(-tokens * BAR // size))
        bar = "█" * filled + "·" * (BAR - filled)
        lines.append(f"  {name:<10}{tokens:>8,}  {bar}  {told}".rstrip())
    return "\n".join(lines)


COMMANDS: dict[str, Command] = {
    "context": Command(
        "/context",
        "where the tokens of the context went",
        _context,
        more="Of each turn: the question's tokens + the reply's. --overflow (/set overflow) says "
        "what happens\nwhen it is full: trim leaves the oldest turns out, summarize has the model "
        "sum them up first,\nerror refuses the question.",
    ),
}
