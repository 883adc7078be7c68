"""How the next token is chosen: frozen options, and the contract of what they start.

Options are torch-free: flags, `compare`, JSON and transcripts hold them. State belongs to one
reply. `choose` works on tensors only and may be captured in a graph; `accept` reads the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Start:
    """What a strategy needs to know about the reply it begins.

    Attributes:
        prompt: the ids before the reply.
        stop_ids: ids that end the reply and are not part of it.
        max_new_tokens: the reply ends after so many ids.
        key: (seed, turn, attempt), which with the step decides every draw.
        device: where logits will be.
        ends: whether a reply so far ends here (stop strings, tested on ids).
    """

    prompt: tuple[int, ...]
    stop_ids: frozenset[int]
    max_new_tokens: int
    key: tuple[int, int, int]
    device: str = "cpu"
    ends: Callable[[Sequence[int]], bool] | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One step for B rows: tokens (B,), the row each came from (B,), log-probabilities (B, V)."""

    tokens: Tensor
    parents: Tensor | None = None
    logprobs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Tail:
    """A continuation that is still open, and its score."""

    ids: tuple[int, ...]
    score: float


@dataclass(frozen=True, slots=True)
class Commit:
    """Ids that can no longer change, whether the reply is over, and the open continuations."""

    ids: tuple[int, ...]
    done: bool
    finish_reason: str | None = None
    tails: tuple[Tail, ...] = ()


class Strategy(Protocol):
    """The state of one reply."""

    def choose(self, logits: Tensor, step: Tensor) -> Choice:
        """Choose from logits (B, V) float32 at step (); tensors only, no host read."""
        ...

    def accept(self, choice: Choice) -> Commit:
        """Take a choice, in order; may lag one step behind `choose`."""
        ...

    def finish(self) -> Commit:
        """End the reply early; whatever was still open is committed."""
        ...


class Decoding(Protocol):
    """Frozen options of one way to decode: a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def width(self) -> int:
        """Rows that one reply needs (beams; otherwise 1)."""
        ...

    @property
    def seed(self) -> int | None:
        """What every draw is keyed by; None: one is drawn for each reply."""
        ...

    def seeded(self, seed: int) -> Decoding:
        """The same with this seed, unless it has one or draws nothing."""
        ...

    def start(self, start: Start) -> Strategy:
        """The state of a new reply."""
        ...
