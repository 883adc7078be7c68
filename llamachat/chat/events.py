"""What a reply is made of, as it happens: everything that the terminal and JSON show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from llamachat.engine.events import Prefill

__all__ = ["Done", "Event", "FinishReason", "Prefill", "Text", "Timings", "Trimmed"]

FinishReason = Literal["stop", "length", "interrupted", "loop"]


@dataclass(frozen=True, slots=True)
class Trimmed:
    """The context was full: so many of the oldest turns were left out of the prompt."""

    turns: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Text:
    """The next piece of the reply; pieces add up to the whole, and none is retracted."""

    text: str


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one reply's phases. `ttft_s`: from the call to the first token."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Done:
    """The reply is over, and what it was."""

    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...]
    prompt_tokens: int
    reused_tokens: int
    seed: int | None
    strategy: Mapping[str, Any]
    trimmed: Trimmed = field(default_factory=lambda: Trimmed(0, 0))
    timings: Timings = field(default_factory=Timings)


Event: TypeAlias = Trimmed | Prefill | Text | Done
