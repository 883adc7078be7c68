"""What a reply is made of, as it happens: everything that the terminal and JSON show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from llamachat.engine.events import Prefill, Probabilities, Probability, Speculation
from llamachat.errors import LlamachatError

__all__ = [
    "Done", "Event", "FinishReason", "OpenText", "Prefill", "Probabilities", "Probability",
    "Speculation", "Summarizing", "Tails", "Text", "Timings", "Trimmed",
]  # fmt: skip

FinishReason = Literal["stop", "length", "interrupted", "loop"]


@dataclass(frozen=True, slots=True)
class Summarizing:
    """The context is full: the model first sums up so many of the oldest turns."""

    turns: int


@dataclass(frozen=True, slots=True)
class Trimmed:
    """The context was full: so many of the oldest turns were left out of the prompt.

    Attributes:
        turns: how many.
        tokens: what this saved.
        note: what the prompt says instead, if they were summarized.
        problem: why they were not, though it was asked for.
    """

    turns: int
    tokens: int
    note: str | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """The next piece of the reply; pieces add up to the whole, and none is retracted.

    Where probabilities were asked for each token has a piece, which may be "" (a character or a
    stop string that is not whole yet); what was held back to the end comes without any.
    """

    text: str
    probabilities: Probabilities | None = None


@dataclass(frozen=True, slots=True)
class OpenText:
    """How the reply may go on after all `Text`, and the score of that."""

    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Tails:
    """The continuations that are open now, the best first; the next event replaces them."""

    tails: tuple[OpenText, ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one reply's phases. `ttft_s`: from the call to the first token."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Done:
    """The reply is over, and what it was; one that was continued: what was added.

    Attributes:
        logprobs: one for each of `token_ids`, if they were asked for.
        attempt: with the seed the key of every draw; 0 before the first `regenerate`.
        speculation: what came of drafts, where they were asked for and the reply came to its end.
        mean_logprob: of its tokens, by the model alone; of one of several replies.
        counted: its tokens, where a server counts them.
        problem: why it was interrupted, if not by the user.
    """

    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...]
    prompt_tokens: int
    reused_tokens: int
    seed: int | None
    strategy: Mapping[str, Any]
    trimmed: Trimmed = field(default_factory=lambda: Trimmed(0, 0))
    timings: Timings = field(default_factory=Timings)
    logprobs: tuple[Probabilities, ...] = ()
    attempt: int = 0
    speculation: Speculation | None = None
    mean_logprob: float | None = None
    counted: int | None = None
    problem: LlamachatError | None = None

    @property
    def completion_tokens(self) -> int:
        """How many tokens it has."""
        return len(self.token_ids) if self.counted is None else self.counted


Event: TypeAlias = Summarizing | Trimmed | Prefill | Text | Tails | Done
