"""What the engine yields while it works."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prompt tokens run so far, of all that must be; `reused` more were in the cache already."""

    done: int
    total: int
    reused: int


@dataclass(frozen=True, slots=True)
class Token:
    """The next id of the reply; never a stop id."""

    id: int


@dataclass(frozen=True, slots=True)
class Done:
    """The reply is over: "stop" (a stop id or stop string) or "length"."""

    finish_reason: str


EngineEvent = Prefill | Token | Done
