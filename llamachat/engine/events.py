"""What the engine yields while it works."""

from __future__ import annotations

from dataclasses import dataclass

from llamachat.engine.decoding import Tail
from llamachat.errors import LlamachatError


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prompt tokens run so far, of all that must be; `reused` more were in the cache already."""

    done: int
    total: int
    reused: int


@dataclass(frozen=True, slots=True)
class Probability:
    """An id and its natural log-probability: the model's own, and after penalties and filters."""

    id: int
    logprob: float
    filtered_logprob: float


@dataclass(frozen=True, slots=True)
class Probabilities:
    """The probability of a chosen id, and of the likeliest ids before penalties and filters."""

    chosen: Probability
    top: tuple[Probability, ...]


@dataclass(frozen=True, slots=True)
class Token:
    """The next id of the reply; never a stop id.

    Attributes:
        id: the token.
        probabilities: where they were asked for.
        logprob: the model's own, of one of several replies.
    """

    id: int
    probabilities: Probabilities | None = None
    logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Tails:
    """How the reply may go on after the last `Token`; the next event replaces it."""

    tails: tuple[Tail, ...]


@dataclass(frozen=True, slots=True)
class Speculation:
    """Tokens that were run before they were chosen, and how many of them then were chosen."""

    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as a server counts them: of the prompt, of it those that it had, of the reply."""

    prompt: int
    reused: int
    reply: int


@dataclass(frozen=True, slots=True)
class Done:
    """The reply is over: "stop" (a stop id or stop string), "length" or "loop".

    Attributes:
        usage: where ids are no tokens.
        problem: why it was "interrupted", if not by the user.
    """

    finish_reason: str
    speculation: Speculation | None = None
    usage: Usage | None = None
    problem: LlamachatError | None = None


EngineEvent = Prefill | Token | Tails | Done
