"""`/context`: where the tokens of the context went."""

from __future__ import annotations

from llamachat.chat.commands.effects import Command, Conversation, Effect, Say
from llamachat.chat.usage import Usage, usage

BAR, WORDS = 24, 28  # columns of a bar, and of what a turn begins with


def _context(conversation: Conversation, _: str) -> Effect:
    return Say(table(usage(conversation.session)))


def table(found: Usage) -> str:
    """A line for each part of the context, with a bar that is full where the part fills it."""
    share = found.used / found.ctx_size
    lines = [f"{found.used:,} of {found.ctx_size:,} tokens ({share:.0%})"]
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
    rows += [("template", found.template, ""), ("free", found.free, "")]
    for name, tokens, told in rows:
        filled = min(BAR, -(-tokens * BAR // found.ctx_size))
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
