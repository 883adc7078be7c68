"""The line below the prompt: how full the context is, how fast replies come, how they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prompt_toolkit.utils import get_cwidth

from llamachat.engine.parameters import PARAMETERS, PENALTIES

if TYPE_CHECKING:
    from llamachat.chat.commands import Conversation

SEPARATOR = " · "


def toolbar(conversation: Conversation, columns: int) -> str:
    """Context used, speed of the last reply, and how it decodes, as far as there is room."""
    return fitted([*_context(conversation), *_decoding(conversation)], columns)


def fitted(parts: Sequence[str], columns: int) -> str:
    """The parts on one line; those at its end go first where it is narrow."""
    kept = list(parts)
    while len(kept) > 1 and get_cwidth(SEPARATOR.join(kept)) > columns:
        kept.pop()
    return SEPARATOR.join(kept)


def _context(conversation: Conversation) -> list[str]:
    from llamachat.chat.context import UNBOUNDED  # it comes with the model, after the prompt

    done = conversation.last
    used, size = conversation.used_tokens, conversation.session.model.engine.ctx_size
    whole = f"/{size:,}" if size < UNBOUNDED else ""
    parts = [f"ctx {used:,}{whole}".replace(",", " ")]
    if done is not None and done.timings.decode_s > 0 and done.completion_tokens > 1:
        parts.append(f"{(done.completion_tokens - 1) / done.timings.decode_s:.1f} tok/s")
    return parts


def _decoding(conversation: Conversation) -> list[str]:
    session = conversation.session
    values = {name: value for name, (value, _) in session.options.values().items()}
    drawn, beams = values["temperature"] != 0, session.options.beams()
    parts = [f"{beams['num_beams'][0]} beams"] if beams else []
    if drawn:
        parts.append(f"temperature {values['temperature']:g}")
    elif not beams:
        parts.append("greedy")
    return parts + [
        f"{name.replace('_', '-')} {values[name]:g}"
        for name, parameter in PARAMETERS.items()
        if name != "temperature" and values[name] != parameter.off
        if drawn or name in PENALTIES
    ]
